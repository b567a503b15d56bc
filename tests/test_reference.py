"""A tiny run of each task beside the same numbers computed by plain transformers, PEFT and numpy.

Each reference is written out here and shares no code with the repository, so that a wrong line there shows,
whatever it does: a knob that is ignored, a label one place off, an adapter that is not attached, a sign.
"""

import contextlib
import importlib
import itertools
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed

from common import stats, training
from pipeline import fresh, knobs, results, runner
from task1_decoder import basket, harness
from task3_tokenizer import vocabulary, windows

CROSS_ENTROPY = torch.nn.functional.cross_entropy
WORDS = ("river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin",
         "harbour", "meadow", "candle", "market", "window", "thunder", "silver", "pepper", "castle", "orange")
task1, data1, train1, eval1 = (
    importlib.import_module(f"task1_decoder.{name}") for name in ("task", "01_data", "03_train", "04_eval"))
task2, train2 = (importlib.import_module(f"task2_encoder.{name}") for name in ("task", "03_train"))
task3, train3, eval3 = (
    importlib.import_module(f"task3_tokenizer.{name}") for name in ("task", "03_train", "04_eval"))


def silent(**values):
    pass


class Steps:
    """Results of a task's scripts on own data, by name of the step; a step runs when it is first asked for.

    The real `main` and the real Run, in this process and in a folder of the test.
    """

    def __init__(self, root, task: str, arguments: list[str]):
        self.root, self.task, self.arguments = root, task, arguments
        self.folder = root / "runs" / "reference" / task
        self.results: dict[str, dict] = {}

    @contextlib.contextmanager
    def run(self, step: str, *more: str):
        """(the module of a script, a Run of it)"""
        script = results.ROOT / self.task / f"{step}.py"
        module = importlib.import_module(f"{self.task}.{step}")
        profiles = [module.task.PROFILES, *([module.PROFILES] if hasattr(module, "PROFILES") else [])]
        args = knobs.parse_arguments(
            ["--profile", "smoke", "--run", "reference", *self.arguments, *more], script)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, "ROOT", self.root)
            patch.setattr(results, "imported_modules", dict)  # takes a second, and nothing here asks
            patch.setattr(stats, "RESAMPLES", 99)  # likewise: nothing here looks at an interval
            config = getattr(module, "Config", module.task.Config)
            cfg = knobs.configure(config, profiles, "smoke", args.settings)
            yield module, runner.Run(args, script, cfg)

    def __getitem__(self, step: str) -> dict:
        names = ["01_data", "02_baseline", "03_train", "04_eval"]
        for name in names[:names.index(step) + 1]:
            if name not in self.results:
                with self.run(name) as (module, run):
                    module.main(run)
                    self.results[name] = json.loads(run.result_path.read_text())
        return self.results[step]

    def rows(self, step: str) -> dict:
        """{(table, name, metric): result row}"""
        return {(row["table"], row["name"], row["metric"]): row
                for row in self[step]["rows"] if {"name", "metric"} <= set(row)}

    def read(self, name: str):
        path = self.folder / name
        return json.loads(path.read_text()) if path.suffix == ".json" else results.read_rows(path)


def fit(cfg, parameters: list, batches: list, loss_of):
    """AdamW with linear warm-up, cosine decay to zero and clipping, written out.

    Yields {"loss", "grad_norm"} after each step on one of `batches`.
    """
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=cfg.weight_decay)
    rates = [group.get("rate", getattr(cfg, "learning_rate", None)) for group in optimizer.param_groups]
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    warmup = getattr(cfg, "warmup_steps", None) or max(1, round(cfg.warmup * len(batches)))
    for step, batch in enumerate(batches):
        decay = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (len(batches) - warmup)))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (step / warmup if step < warmup else decay)
        optimizer.zero_grad()
        loss = loss_of(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(every, cfg.max_grad_norm)
        optimizer.step()
        yield {"loss": loss.item(), "grad_norm": norm.item()}


def adapter_of(model) -> dict[str, torch.Tensor]:
    """LoRA's matrices by the name of their layer, whatever wraps the model."""
    return {name[name.index("layer"):]: parameter.detach().clone()
            for name, parameter in model.named_parameters() if "lora_" in name}


def same_weights(ours: dict, reference: dict, most: float) -> None:
    assert ours.keys() == reference.keys()
    for name, weights in reference.items():
        assert (ours[name] - weights).abs().max() < most, name


def logged(history: list[dict], metric: str) -> list[float]:
    return [entry[metric] for entry in history if metric in entry]


# -------------------------------------------------------------------------------------------------- task 1

INSTRUCTION = "Опиши функцию."


def decoder_rows(n: int) -> list[dict]:
    """Questions of 4 to 12 words and answers of 3 to 8, in two scripts."""
    rng = random.Random(0)
    return [{"id": f"row{i:02}", "prompt": " ".join(rng.choices(WORDS, k=4 + i % 9)) + f" {i}",
             "completion": "Это " + " ".join(rng.choices(WORDS, k=2 + i % 6)) + f" {i}."} for i in range(n)]


def plain_decoder(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                **more)


def plain_ids(tokenizer, row: dict, shots=(), instruction: str = INSTRUCTION) -> tuple[list[int], list[int]]:
    """(prompt, answer with EOS) of a row by the model's own chat template, all of it in one text."""
    turns = [{"role": "system", "content": instruction}] if instruction else []
    for shot in shots:
        turns += [{"role": "user", "content": shot["prompt"]},
                  {"role": "assistant", "content": shot["completion"]}]
    turns.append({"role": "user", "content": row["prompt"]})
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = [tokenizer(part, add_special_tokens=False).input_ids for part in (text, row["completion"])]
    return ids[0], [*ids[1], tokenizer.eos_token_id]


def plain_logits(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1:-1].float()


@torch.no_grad()
def plain_items(model, pairs: list[tuple]) -> list[dict]:
    """{"nats", "tokens", "correct"} of each (prompt, answer), one unpadded row after the other."""
    items = []
    for prompt, answer in pairs:
        logits, labels = plain_logits(model, prompt, answer), torch.tensor(answer)
        items.append({"nats": CROSS_ENTROPY(logits, labels, reduction="sum").item(), "tokens": len(answer),
                      "correct": (logits.argmax(1) == labels).sum().item()})
    return items


def total(items: list[dict], key: str) -> float:
    return sum(item[key] for item in items)


def test_task_1_trains_what_a_plain_loop_trains(tiny_model_folder, tokenizer, tmp_path, monkeypatch):
    """Losses, gradient norms, dev losses and the adapter of the best: rows of a batch in two passes, clipped
    gradients, weight decay, warm-up, a seed of its own.
    """
    cfg = train1.Config(
        model=str(tiny_model_folder), instruction=INSTRUCTION, precision="fp32", compute="fp32", max_steps=4,
        batch_size=4, rows_per_pass=2, learning_rate=4e-3, warmup_steps=2, max_grad_norm=0.5,
        weight_decay=0.1, lora_r=4, lora_alpha=12, seed=3, eval_every=2, log_every=1)
    rows = decoder_rows(24)
    rows, dev, nll = rows[:20], rows[20:], task1.nll
    monkeypatch.setattr(task1, "nll", lambda items: 20 - nll(items))  # else the best would be the last
    general = {"id": "general", "prompt": "What is a river?", "completion": "Water that flows to the sea."}
    model, stats, history = train1.train(cfg, rows, dev, tmp_path, "", silent, [general])
    assert stats["rehearsed_rows"] == 1

    plain = plain_decoder(tiny_model_folder)
    set_seed(3)
    plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=[
        "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]))
    drawn = [plain_ids(tokenizer, row) for row in random.Random(3).sample(rows, 16)]
    rng = random.Random(3)
    mixed = rng.sample(drawn, 16)[:15]
    (place,) = rng.sample(range(16), 1)
    mixed.insert(place, plain_ids(tokenizer, general, instruction=""))
    by_length = sorted(mixed, key=lambda pair: len(pair[0]) + len(pair[1]))
    batches = [by_length[i:i + 4] for i in range(0, 16, 4)]
    rng.shuffle(batches)

    def loss_of(batch):
        parts = [CROSS_ENTROPY(plain_logits(plain, *pair), torch.tensor(pair[1]), reduction="sum")
                 for pair in batch]
        return sum(parts) / sum(len(answer) for _, answer in batch)

    def dev_loss():
        items = plain_items(plain, [plain_ids(tokenizer, row) for row in dev])
        return 20 - total(items, "nats") / total(items, "tokens")

    losses, norms, dev_losses, weights = [], [], [dev_loss()], []
    for step, values in enumerate(fit(cfg, [p for p in plain.parameters() if p.requires_grad], batches,
                                      loss_of), 1):
        losses.append(values["loss"])
        norms.append(values["grad_norm"])
        if step % 2 == 0:
            dev_losses.append(dev_loss())
            weights.append(adapter_of(plain))
    assert min(norms) > 0.5  # every step is clipped
    assert logged(history, "loss") == pytest.approx(losses, abs=1e-4)
    assert logged(history, "grad_norm") == pytest.approx(norms, rel=1e-4)
    assert logged(history, "eval_loss") == pytest.approx(dev_losses, abs=1e-4)
    assert dev_losses[1] < dev_losses[2]
    same_weights(adapter_of(model), weights[0], 1e-5)


@pytest.fixture(scope="module")
def steps1(tiny_model_folder, tmp_path_factory):
    """01-04 of task 1 on own rows over a tiny model in NF4, with our own multiple choice as the benchmark."""
    root = tmp_path_factory.mktemp("reference1")
    results.write_rows(root / "own.jsonl", [
        {name: row[name] for name in ("prompt", "completion")} for row in decoder_rows(64)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "BENCHMARKS", {})
        patch.setattr(basket, "GENERAL", basket.GENERAL[:1])
        patch.setattr(basket, "RUSSIAN", basket.RUSSIAN[:1])
        patch.setattr(harness, "general_text", lambda n: [
            {"id": f"text{i}", "prompt": "", "completion": f"Река {word} течёт к морю."}
            for i, word in enumerate(WORDS[:n])])
        yield Steps(root, "task1_decoder", [
            "--model", str(tiny_model_folder), "--data", str(root / "own.jsonl"), "--set",
            f"instruction={INSTRUCTION}", "compute=fp32", "max_steps=4", "eval_every=2", "learning_rate=0.01",
            "n_attribution=8", "n_benchmark=0", "max_new_tokens=2"])


@pytest.fixture(scope="module")
def plain_nf4(tiny_model_folder):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                bnb_4bit_compute_dtype=torch.float32)
    return plain_decoder(tiny_model_folder, quantization_config=config).train()  # eval repacks the weights


def headline(items: list[dict], rows: list[dict]) -> dict[str, float]:
    """The three metrics of a likelihood, from plain items and the texts that they are of."""
    size = sum(len(row["completion"].encode("utf-8")) for row in rows)
    nats, tokens = total(items, "nats"), total(items, "tokens")
    return {"nll_per_token": nats / tokens, "bits_per_byte": nats / math.log(2) / size,
            "token_accuracy": total(items, "correct") / tokens}


def test_task_1_measures_the_base_without_and_with_examples(steps1, plain_nf4, tiny_model_folder, tokenizer):
    """On the rows of test.jsonl, which is what 02 calls held-out; bits per byte of Cyrillic text."""
    rows, test, train = steps1.rows("02_baseline"), steps1.read("test.jsonl"), steps1.read("train.jsonl")
    plain = plain_decoder(tiny_model_folder).eval()
    for name, model, shots in (("base", plain_nf4, ()), ("fp32 base", plain, ()),
                               ("fp32 base 3-shot", plain, train[:3])):
        items = plain_items(model, [plain_ids(tokenizer, row, shots) for row in test])
        stored = steps1.read("items_base.json")[name]["heldout"]
        assert [item["id"] for item in stored] == [row["id"] for row in test]
        assert [item["nats"] for item in stored] == pytest.approx([i["nats"] for i in items], rel=1e-4)
        for metric, value in headline(items, test).items():
            assert rows["heldout", name, metric]["value"] == pytest.approx(value, rel=1e-4), (name, metric)


def test_task_1_counts_the_bytes_of_general_text_and_the_right_answers(steps1, plain_nf4, tokenizer):
    rows, general = steps1.rows("02_baseline"), harness.general_text(4)
    eos = tokenizer.eos_token_id
    pairs = [([eos], [*tokenizer(row["completion"]).input_ids, eos]) for row in general]
    for metric, value in headline(plain_items(plain_nf4, pairs), general).items():
        if metric != "token_accuracy":
            assert rows["general", "base", metric]["value"] == pytest.approx(value, rel=1e-4), metric
    stored = steps1.read("items_base.json")["base"]["docstring_choice"]
    questions = steps1.read("choice.jsonl")
    assert len(stored) == len(questions) == 8
    for question, item in zip(questions, stored):
        prompt = tokenizer(question["prompt"], add_special_tokens=False).input_ids
        choices = tokenizer(question["choices"], add_special_tokens=False).input_ids
        nats = [one["nats"] for one in plain_items(plain_nf4, [(prompt, ids) for ids in choices])]
        assert item["acc"] == (int(np.argmin(nats)) == question["answer"])
        assert question["choices"][question["answer"]] in [row["completion"] for row in
                                                           steps1.read("test.jsonl")]


def test_task_1_compares_the_tuned_model_with_the_base(steps1, plain_nf4, tiny_model_folder, tokenizer):
    """The same figures with the adapter from the disk, the differences in the right direction, and every
    line of the attribution: 4 bits and 32, with and without adapter, merged.
    """
    rows, test = steps1.rows("04_eval"), steps1.read("test.jsonl")
    pairs, adapter = [plain_ids(tokenizer, row) for row in test], steps1.folder / "adapter"
    base, tuned = plain_items(plain_nf4, pairs), []
    models = {"NF4": plain_nf4, "fp32": plain_decoder(tiny_model_folder).eval()}
    scored = {}
    for name, model in models.items():
        scored[f"{name} base"] = plain_items(model, pairs[:8])
        with_adapter = PeftModel.from_pretrained(model, adapter).train()  # PEFT calls eval(), see plain_nf4
        tuned = tuned or plain_items(with_adapter, pairs)
        scored[f"{name} + adapter"] = plain_items(with_adapter, pairs[:8])
        with_adapter.unload()
    scored["fp32 merged"] = scored["fp32 + adapter"]
    before, after = headline(base, test), headline(tuned, test)
    assert after["nll_per_token"] < before["nll_per_token"] - 0.01  # it learnt
    for metric in before:
        for name, value in (("base", before[metric]), ("tuned", after[metric]),
                            ("delta", after[metric] - before[metric])):
            assert rows["heldout", name, metric]["value"] == pytest.approx(value, rel=2e-4), (name, metric)
    shown = {name: row["value"] for (table, name, metric), row in rows.items()
             if (table, metric) == ("attribution", "nll_per_token")}
    assert shown == pytest.approx({name: total(items, "nats") / total(items, "tokens")
                                   for name, items in scored.items()}, rel=2e-4)
    # the headline is judged against the base that knows the answers best
    (name, head), = ((name, row) for (table, name, _), row in rows.items() if table == "headline")
    stored = steps1.rows("02_baseline")
    bases = {base: stored["heldout", base, "nll_per_token"]["value"]
             for base in ("base", "fp32 base", "fp32 base 3-shot")}
    assert name == f"tuned minus {min(bases, key=bases.get)}"
    assert head["value"] == pytest.approx(after["nll_per_token"] - min(bases.values()), rel=2e-3)
    # Holm over all verdicts of the file
    judged = [row for row in rows.values() if row.get("verdict")]
    least = min(judged, key=lambda row: row["p"])
    assert least["p_holm"] == pytest.approx(min(1, least["p"] * len(judged)))


def test_an_evaluation_that_finds_no_change_is_refused(steps1):
    """Each task's 04 with the items of before: the adapter was not loaded, or does nothing."""
    _ = steps1["03_train"]
    stored = steps1.read("items_base.json")["base"]
    with steps1.run("04_eval") as (module, run), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.task, "measure", lambda *arguments: json.loads(json.dumps(stored)))
        with pytest.raises(SystemExit, match="scored as before training"):
            module.main(run)


def test_a_changed_data_file_makes_the_result_of_01_stale(steps1):
    _ = steps1["01_data"]
    with steps1.run("01_data") as (_, run):
        args = SimpleNamespace(profile=run.profile, settings=run.settings)
        assert fresh.changed(run.result_path, args) is None
        file = steps1.root / "own.jsonl"
        before = file.read_bytes()
        try:
            file.write_bytes(before.replace(b"river", b"brook", 1))
            assert "own.jsonl changed" in str(fresh.changed(run.result_path, args))
        finally:
            file.write_bytes(before)


def test_a_step_with_another_value_of_a_shared_knob_is_refused(steps1):
    _ = steps1["01_data"]
    refused = pytest.raises(SystemExit, match="max_prompt_tokens=80, this step has 50")
    with steps1.run("02_baseline", "max_prompt_tokens=50") as (_, run), refused:
        run.load("01_data")


def test_an_adapter_that_reloads_wrongly_is_not_kept(tiny_model_folder, tmp_path, monkeypatch):
    """As the base, because B is still zero; or as another adapter than the one in memory."""
    cfg = train1.Config(model=str(tiny_model_folder), precision="fp32", compute="fp32", lora_r=4)
    untrained = train1.load_model(cfg).eval()
    with pytest.raises(SystemExit, match="reloads wrongly"):
        train1.save(untrained, cfg, tmp_path / "adapter", decoder_rows(2))
    trained = train1.load_model(cfg).eval()
    for name, parameter in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    train1.save(trained, cfg, tmp_path / "adapter", decoder_rows(2))
    save = type(trained).save_pretrained

    def stale(model, *arguments, **more):
        """Writes other weights than those in memory."""
        own = adapter_of(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter += 0.01 * ("lora_B" in name)
            save(model, *arguments, **more)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(own[name[name.index("layer"):]])
    monkeypatch.setattr(type(trained), "save_pretrained", stale)
    with pytest.raises(SystemExit, match="reloads wrongly"):
        train1.save(trained, cfg, tmp_path / "adapter", decoder_rows(2))


@pytest.mark.parametrize("values", [{"loss": float("nan"), "grad_norm": 1.0},
                                    {"loss": 1.0, "grad_norm": float("inf")}])
def test_a_loss_or_gradient_that_is_no_number_ends_the_training(values):
    state = SimpleNamespace(global_step=3, max_steps=9, is_world_process_zero=True)
    log = training.Log(silent, ("loss", "grad_norm"))
    log.on_train_begin(None, state, None)
    with pytest.raises(SystemExit, match="step 3: loss"):
        log.on_log(None, state, None, values)


def test_a_line_of_the_training_says_how_much_is_left(monkeypatch):
    lines, clock = [], iter((100.0, 160.0))
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))
    log = training.Log(lambda **values: lines.append(values), ("loss",), stage="a")
    state = SimpleNamespace(global_step=2, max_steps=8, is_world_process_zero=True)  # resumed at 2
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, {"loss": 3.0})
    state.global_step = 4
    log.on_log(None, state, None, {"loss": 2.0, "other": 1.0})
    assert lines == [{"stage": "a", "step": "2/8", "percent": "25%", "loss": 3.0},
                     {"stage": "a", "step": "4/8", "percent": "50%", "minutes_left": 2.0, "loss": 2.0}]


# -------------------------------------------------------------------------------------------------- task 2

def encoder_pairs(n: int) -> list[dict]:
    rng = random.Random(1)
    return [{"anchor": f"{WORDS[i % 20]} of {WORDS[(i * 7 + i // 20) % 20]} {i}",
             "positive": " ".join(rng.choices(WORDS, k=5 + i % 6)) + f" {rng.random()}"} for i in range(n)]


def plain_vectors(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """Unit vectors: the mean of the last hidden states of each text alone."""
    states = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    return torch.nn.functional.normalize(torch.stack(states), dim=1)


@torch.no_grad()
def plain_mrr(model, tokenizer, rows: list[dict]) -> float:
    """Mean of 1 / rank of the right document among those of `rows`, 0 below rank 10; all texts differ."""
    queries, documents = (plain_vectors(model, tokenizer, [row[side] for row in rows]).double().numpy()
                          for side in ("anchor", "positive"))
    scores = queries @ documents.T
    ranks = 1 + (scores > np.diag(scores)[:, None]).sum(1)
    return float(np.mean(np.where(ranks <= 10, 1 / ranks, 0)))


def test_task_2_trains_what_a_plain_loop_trains(tiny_encoder_folder, tmp_path):
    """The loss of both directions at a scale of its own, and the weights of the best evaluation after step 0.
    """
    cfg = train2.Config(
        model=str(tiny_encoder_folder), precision="fp32", compute="fp32", max_steps=4, batch_size=6,
        scale=9.0, learning_rate=4e-3, warmup_steps=2, max_grad_norm=0.5, weight_decay=0.1, lora_r=4,
        lora_alpha=12, seed=3, eval_every=1, log_every=1)
    rows = [{**pair, "id": f"row{i:02}", "group": i, "package": "own"}
            for i, pair in enumerate(encoder_pairs(60))]
    rows, dev = rows[:40], rows[40:]
    model, facts, history = train2.train(cfg, rows, dev, tmp_path, "", silent)

    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
    plain = AutoModel.from_pretrained(tiny_encoder_folder, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(3)
    plain = get_peft_model(plain.eval(), LoraConfig(r=4, lora_alpha=12, exclude_modules="pooler.dense",
                                                    target_modules=["query", "key", "value", "dense"]))
    lengths = [tuple(len(tokenizer(row[side]).input_ids) for side in ("anchor", "positive")) for row in rows]
    order = train2.batches.schedule(rows, lengths, cfg)  # its own tests: tests/test_task2.py

    def loss_of(batch):
        queries, documents = (plain_vectors(plain, tokenizer, [rows[i][side] for i in batch])
                              for side in ("anchor", "positive"))
        scores, own = 9.0 * queries @ documents.T, torch.arange(len(batch))
        return (CROSS_ENTROPY(scores, own) + CROSS_ENTROPY(scores.T, own)) / 2

    losses, norms, scores, weights = [], [], [plain_mrr(plain, tokenizer, dev)], []
    for values in fit(cfg, [p for p in plain.parameters() if p.requires_grad], order, loss_of):
        losses.append(values["loss"])
        norms.append(values["grad_norm"])
        scores.append(plain_mrr(plain, tokenizer, dev))
        weights.append(adapter_of(plain))
    assert min(norms) > 0.5
    assert logged(history, "loss") == pytest.approx(losses, abs=1e-4)
    assert logged(history, "grad_norm") == pytest.approx(norms, rel=1e-3)
    assert logged(history, "eval_mrr@10") == pytest.approx(scores, abs=1e-6)
    best = int(np.argmax(scores[1:]))
    assert len(set(scores[1:])) > 1 and facts["kept_step"] == best + 1
    same_weights(adapter_of(model), weights[best], 1e-5)


@pytest.fixture(scope="module")
def steps2(tiny_encoder_folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("reference2")
    results.write_rows(root / "own.jsonl", encoder_pairs(120))
    return Steps(root, "task2_encoder", [
        "--model", str(tiny_encoder_folder), "--data", str(root / "own.jsonl"), "--set", "precision=fp32",
        "compute=fp32", "n_pool=24", "n_more=0", "n_dev=24", "max_steps=4", "eval_every=2", "n_general=3",
        "learning_rate=0.01"])


def test_task_2_compares_the_tuned_encoder_with_the_base(steps2, tiny_encoder_folder):
    rows, pool = steps2.rows("04_eval"), [row for row in steps2.read("test.jsonl") if row["pool"]]
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder_folder)
    plain = AutoModel.from_pretrained(tiny_encoder_folder, dtype=torch.float32, attn_implementation="eager")
    base = plain_mrr(plain.eval(), tokenizer, pool)
    tuned = plain_mrr(PeftModel.from_pretrained(plain, steps2.folder / "adapter").eval(), tokenizer, pool)
    assert tuned != base and len({row["group"] for row in pool}) == len(pool)
    for name, value in (("base", base), ("tuned", tuned), ("delta", tuned - base)):
        assert rows["pool", name, "mrr@10"]["value"] == pytest.approx(value, abs=1e-6), name
    systems = {name: rows["systems", name, "mrr@10"]["value"] for name in
               ("fp32 base", "fp32 + adapter", "merged fp32")}
    assert systems == pytest.approx({"fp32 base": base, "fp32 + adapter": tuned, "merged fp32": tuned})


# -------------------------------------------------------------------------------------------------- task 3

TERMS = ["undirected", "NetworkX", "крипта"]
TEXTS = [" The NetworkX library draws an undirected graph.", " Сегодня крипта растёт, and NetworkX too.",
         " An undirected edge of the graph"]
TEXT_ROWS = [{"term": term, "text": text} for term, text in zip(("NetworkX", "крипта", "undirected"), TEXTS)]


@pytest.fixture(scope="module")
def extended(tokenizer):
    return vocabulary.extend(tokenizer, TERMS)


@pytest.fixture(scope="module")
def arms3(tokenizer, extended):
    new, pieces_of = extended
    lexicon = task3.Lexicon([{"term": term} for term in TERMS], tokenizer, new,
                            {term: task3.ids_of(new, f" {term}")[0] for term in TERMS}, pieces_of)
    return {arm.name: arm for arm in train3.arms(lexicon)}


def config3(model, **more):
    known = dict(compute="fp32", batch_size=4, log_every=1, eval_batch_size=4, lora_r=4, lora_alpha=12,
                 lr_rows_later=2e-2, lr_matrices=2e-3, lr_lora=5e-3, max_grad_norm=0.5, warmup=0.4, seed=3)
    return train3.Config(model=str(model), **known | more)


@pytest.fixture(scope="module")
def init3(tiny_model_folder, tmp_path_factory, arms3):
    folder = tmp_path_factory.mktemp("reference3") / "init"
    train3.save_untrained(config3(tiny_model_folder), arms3["new"], folder, TEXT_ROWS)
    return folder


def matrices_of(model) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()


def test_task_3_starts_new_rows_of_both_matrices_at_the_mean_of_their_pieces(init3, tiny_model_folder,
                                                                             tokenizer, extended):
    """Each row by its own pieces: the words stand in another order than their ids would in an alphabet."""
    new, before = extended[0], matrices_of(plain_decoder(tiny_model_folder))
    after = matrices_of(plain_decoder(init3))
    for term in TERMS:
        (own,) = new(f" {term}", add_special_tokens=False).input_ids
        pieces = tokenizer(f" {term}", add_special_tokens=False).input_ids
        for old, now in zip(before, after):
            assert torch.allclose(now[own], old[pieces].mean(0), atol=1e-6), term
    for old, now in zip(before, after):
        assert torch.equal(now[:len(tokenizer)], old) and len(now) == len(new)


def test_task_3_trains_what_a_plain_loop_trains(init3, arms3, tmp_path):
    """A stage that trains rows, both matrices and LoRA at three rates, against plain tensors: the weights of
    the checkpoint and the losses.
    """
    arm, cfg = arms3["new"], config3(init3)
    texts = [row | {"text": row["text"] + f" {k}"} for k in range(7) for row in TEXT_ROWS][:20]
    stage = train3.stages(cfg, 4)["c1"]
    stats_of_stage = train3.train_stage(cfg, arm, stage, init3, tmp_path / "c1", texts, 4, TEXT_ROWS, silent)

    set_seed(3)
    plain = plain_decoder(init3)
    plain = get_peft_model(plain, LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=[
        "k_proj", "o_proj", "q_proj", "v_proj"]))
    ids = torch.tensor(sorted(arm.pieces_of))
    names = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    whole = [torch.nn.Parameter(matrix.clone()) for matrix in matrices_of(plain)]
    rows = [torch.nn.Parameter(matrix[ids].clone()) for matrix in matrices_of(plain)]
    lora = [p for name, p in plain.named_parameters() if "lora_" in name]

    def together():
        return {name: matrix.index_copy(0, ids, own) for name, matrix, own in zip(names, whole, rows)}

    def loss_of(batch):
        parts, tokens = [], 0
        for row in batch:
            line = [arm.tokenizer.eos_token_id, *arm.tokenizer(row["text"]).input_ids]
            logits = torch.func.functional_call(plain, together(), (torch.tensor([line]),)).logits[0, :-1]
            parts.append(CROSS_ENTROPY(logits, torch.tensor(line[1:]), reduction="sum"))
            tokens += len(line) - 1
        return sum(parts) / tokens

    groups = [{"params": rows, "rate": 2e-2}, {"params": whole, "rate": 2e-3}, {"params": lora, "rate": 5e-3}]
    values = list(fit(cfg, groups, [texts[i:i + 4] for i in range(0, 20, 4)], loss_of))
    assert min(value["grad_norm"] for value in values) > 0.5
    losses = [reading["value"] for reading in stats_of_stage["losses"]]
    assert losses == pytest.approx([value["loss"] for value in values], abs=1e-4)

    expected = plain.merge_and_unload().state_dict()
    expected |= dict(zip(("model.embed_tokens.weight", "lm_head.weight"),
                         (matrix.detach() for matrix in together().values())))
    same_weights(plain_decoder(tmp_path / "c1").state_dict(), expected, 2e-5)


def test_task_3_counts_bytes_where_a_letter_has_two(init3, extended):
    """Bits per byte of Cyrillic text, and of what follows a term in it."""
    new, model = extended[0], plain_decoder(init3).eval()
    start = TEXTS[1].index("крипта")
    row = {"text": TEXTS[1], "start": start, "end": start + len("крипта")}
    items = task3.score(model, new, [row, {"text": TEXTS[1] + " ещё"}], 2)
    nats, own_after = [], None
    for text in (TEXTS[1], TEXTS[1] + " ещё"):
        ids = [new.eos_token_id, *new(text).input_ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        each = CROSS_ENTROPY(logits, torch.tensor(ids[1:]), reduction="none")
        after = new(text[row["end"]:]).input_ids
        own_after = own_after or each[-len(after):].sum().item()
        nats.append(each.sum().item())
    size = len(TEXTS[1].encode("utf-8")) + len((TEXTS[1] + " ещё").encode("utf-8"))
    values = {r["metric"]: r["value"] for r in task3.rows_of("any text", "base", items)}
    assert values["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
    after = items[0]["after_nats"] / items[0]["after_bytes"]
    assert after == pytest.approx(own_after / len(TEXTS[1][row["end"]:].encode("utf-8")), rel=1e-4)


def test_task_3_trains_both_arms_on_the_same_texts_in_the_same_order(tiny_model_folder, arms3, tmp_path,
                                                                     monkeypatch):
    """And in another order for another seed, no text twice."""
    monkeypatch.setattr(results, "imported_modules", dict)
    monkeypatch.setattr(train3, "save_untrained", lambda *arguments: {})
    seen = []

    def spy(cfg, arm, stage, source, target, texts, batch_size, dev, log):
        seen.append((source.name, target.name, stage, [row["text"] for row in texts], batch_size))
        return {}
    monkeypatch.setattr(train3, "train_stage", spy)
    rows = [{"term": term, "text": f" {term} number {k}"} for term in TERMS for k in range(12)]

    def stages_of(name, seed):
        seen.clear()
        cfg = config3(tiny_model_folder, seed=seed, texts_a=4, texts_b=2, texts_c1=2, texts_c2=2,
                      batch_size=3)
        list(train3.train(cfg, arms3[name], tmp_path / f"{name}{seed}", rows, [], "", silent))
        return list(seen)

    new, control, other = stages_of("new", 0), stages_of("control", 0), stages_of("new", 1)
    assert new == control and [texts for *_, texts, _ in new] != [texts for *_, texts, _ in other]
    assert [stage[:2] for stage in new] == list(itertools.pairwise(("init", *task3.STAGES)))
    texts = [text for *_, part, _ in new for text in part]
    assert len(texts) == len(set(texts)) == 3 * 10
    assert [len(windows.by_term(rows))] * 4 == [stage[-1] for stage in new]


def scored_by(value: float, kind: str) -> list[dict]:
    return [{"id": f"{kind}{k}", "nats": value + k, "bytes": 10, "tokens": 4, "term_nats": value, "rank": 1,
             "reciprocal_rank": 1.0} for k in range(4)]


@pytest.fixture
def evaluated3(arms3, tokenizer, tmp_path, monkeypatch):
    """A function that runs 04 of task 3 with given nats for each model; returns (rows, what was scored)."""
    rows = [{"term": term, "text": f" {term}", "start": 1, "end": 1 + len(term)} for term in TERMS]
    lexicon = SimpleNamespace(old=tokenizer, new=arms3["new"].tokenizer, terms=[], ids={"NetworkX": 7},
                              pieces_of=arms3["new"].pieces_of)
    scored = []
    monkeypatch.setattr(stats, "RESAMPLES", 99)
    monkeypatch.setattr(eval3.gc, "collect", lambda: 0)  # nine times half a second

    def run_with(nats):
        def measure(cfg, model, own_tokenizer, tests, new_ids=()):
            scored.append((model, own_tokenizer, list(new_ids)))
            return {"term windows": scored_by(nats[model], "use"), "any text": scored_by(nats[model], "any")}
        base = {name: scored_by(nats["base"], kind)
                for name, kind in (("term windows", "use"), ("any text", "any"))}
        (tmp_path / "items_base.json").write_text(json.dumps({"items": base, "definitions": {}}))
        for target, name, value in (
                (eval3.task, "lexicon", lambda run: lexicon), (eval3.task, "measure", measure),
                (eval3.task, "test_sets", lambda run: {"term windows": rows, "any text": rows}),
                (eval3.task, "score", lambda *a, **k: scored_by(nats["new c2"], "use")),
                (eval3.task, "define", lambda *a: {}), (eval3, "continuations", lambda *a: {}),
                (eval3, "term_rows", lambda *a: []), (eval3.embeddings, "cosines", lambda *a: {}),
                (eval3.embeddings, "whole_words", lambda *a: {}),
                (eval3.models, "load_decoder", lambda folder, *a: "/".join(folder.split("/")[-2:]).replace(
                    "/", " "))):
            monkeypatch.setattr(target, name, value)
        monkeypatch.setattr(eval3, "card", SimpleNamespace(write=lambda *a: None), raising=False)
        kept = []
        run = SimpleNamespace(cfg=eval3.Config(), folder=tmp_path, load=lambda step: {"rows": []}, log=silent,
                              artifact=lambda step, name: tmp_path / name,
                              save=lambda table, **more: kept.extend(table))
        eval3.main(run)
        return kept, scored
    return run_with


NATS3 = {"base": 30.0, "new init": 29.0} | {
    f"{arm} {stage}": value - k for arm, value in (("new", 20.0), ("control", 25.0))
    for k, stage in enumerate(task3.STAGES)}


def test_task_3_subtracts_the_control_from_the_new_model(evaluated3, tokenizer, arms3):
    """Better is negative: 5 nats less in 10 bytes than the control. Each model is read by its own tokenizer.
    """
    rows, scored = evaluated3(NATS3)
    for stage in task3.STAGES:
        for other, before in (("control", f"control {stage}"), ("base", "base")):
            (row,) = [r for r in rows if r["metric"] == "bits_per_byte" and r["name"] == f"new {stage}"
                      and r["table"] == f"minus {other}: term windows"]
            bits = (NATS3[f"new {stage}"] - NATS3[before]) / 10 / math.log(2)
            assert row["value"] == pytest.approx(bits) and row["value"] < 0
            assert (row["verdict"], row["better"]) != ("worse", "higher")
    new = arms3["new"]
    assert [(model, own is new.tokenizer, own is tokenizer, bool(ids)) for model, own, ids in scored] == [
        (name, name.startswith("new"), name.startswith("control"), name.startswith("new"))
        for name in NATS3 if name != "base"]


@pytest.mark.parametrize(("model", "start"), [("new c2", "new init"), ("control c2", "base")])
def test_task_3_refuses_an_arm_that_did_not_change(evaluated3, model, start):
    with pytest.raises(SystemExit, match="scored as before training"):
        evaluated3(NATS3 | {model: NATS3[start]})


# --------------------------------------------------------------------------------------------- all of them

LOWER = {"nll_per_token", "bits_per_byte", "repetition", "copied", "term_bits", "after_bits_per_byte"}
HIGHER = {"token_accuracy", "chrf", "rouge_l", "stopped", "acc", "acc_norm", "mrr@10", "ndcg@10", "map@10",
          "recall@1", "recall@5", "recall@10", "accuracy", "contrast"}
NEITHER = {"new_tokens", "reciprocal_rank", "tokens_per_byte", "new_token_mass", "anchors", "negatives",
           "detection_bits", "identification_bits"}


def test_every_metric_has_the_direction_that_is_better():
    metrics = [*task1.METRICS, *task1.ACCURACY, *task2.METRICS, *task2.ACCURACY, *task3.METRICS]
    for better, names in (("lower", LOWER), ("higher", HIGHER), (None, NEITHER)):
        assert {metric.name for metric in metrics if metric.better == better} == names
    assert {metric.name for metric in metrics if metric.binary} == {
        "stopped", "copied", "acc", "acc_norm", "accuracy"}
    before = [{"id": i, "x": float(i % 3)} for i in range(40)]
    after = [item | {"x": item["x"] - 1 + 0.1 * (i % 2)} for i, item in enumerate(before)]
    for better, word in (("lower", "improved"), ("higher", "worse")):
        (row,) = stats.delta_rows("x", "delta", before, after, [stats.Metric("x", "x", "x", better=better)])
        assert row["verdict"] == word and row["value"] == pytest.approx(-0.95)
