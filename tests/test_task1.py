"""Prompt, label mask, padding and scores of task 1."""

import importlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from task1_decoder import scoring, task, training

CFG = task.Config()
ROW = {"id": "a", "prompt": task.SHOTS[2][0], "completion": task.SHOTS[2][1]}
train_config = importlib.import_module("task1_decoder.03_train").Config
LONG = {"id": "b", "prompt": "def f(x):\n" + "    x = x + 1\n" * 200, "completion": "Add one to x two hundred times."}


def test_prompt_is_the_chat_template(tokenizer):
    want = tokenizer.apply_chat_template([{"role": "system", "content": CFG.instruction}, {"role": "user", "content": ROW["prompt"]}],
                                         add_generation_prompt=True, tokenize=False)
    prompt = task.Prompt(tokenizer, CFG)
    assert prompt(ROW["prompt"]) == tokenizer(want, add_special_tokens=False).input_ids
    assert prompt.text(ROW["prompt"]) == want


def test_a_long_prompt_is_cut_inside_the_user_text_only(tokenizer):
    prompt = task.Prompt(tokenizer, CFG)
    ids = prompt(LONG["prompt"])
    assert len(ids) == len(prompt.head) + CFG.max_prompt_tokens + len(prompt.tail)
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_label_mask_covers_exactly_the_prompt_and_keeps_eos(tokenizer):
    prompt = task.Prompt(tokenizer, CFG)
    example = task.encode(prompt, ROW, CFG)
    trained = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(trained) == ROW["completion"] + tokenizer.eos_token
    assert example["labels"][:-len(trained)] == [-100] * len(prompt(ROW["prompt"]))
    assert example["input_ids"] == prompt(ROW["prompt"]) + trained


def test_a_cut_completion_has_no_eos(tokenizer):
    cfg = task.Config(max_completion_tokens=4)
    assert task.encode(task.Prompt(tokenizer, cfg), ROW, cfg)["labels"][-1] != tokenizer.eos_token_id


def test_collate_keeps_eos_labels_though_padding_differs_in_length(tokenizer):
    prompt = task.Prompt(tokenizer, CFG)
    examples = [task.encode(prompt, row, CFG) for row in (ROW, LONG)]
    batch = task.collate(examples, tokenizer.pad_token_id)
    assert batch["labels"].shape == (2, batch["logits_to_keep"])
    for row, example in enumerate(examples):
        assert [label for label in batch["labels"][row].tolist() if label != -100] == [label for label in example["labels"] if label != -100]
        assert batch["attention_mask"][row].sum() == len(example["input_ids"])


def test_nll_equals_the_sum_computed_row_by_row(tiny_model, tokenizer):
    """Padding, sliced logits and batching change nothing: compare with one unpadded row at a time and full logits."""
    prompt = task.Prompt(tokenizer, CFG)
    examples = [task.encode(prompt, row, CFG) for row in (ROW, LONG, {**ROW, "completion": "Yes."})]
    got = task.nll(tiny_model, tokenizer, examples, batch_size=3)
    for example, scored in zip(examples, got):
        with torch.no_grad():
            logprobs = tiny_model(torch.tensor([example["input_ids"]])).logits[0].float().log_softmax(-1)
        want = -sum(logprobs[i - 1, label].item() for i, label in enumerate(example["labels"]) if label != -100)
        assert scored["nats"] == pytest.approx(want, rel=1e-4)
        assert scored["tokens"] == sum(label != -100 for label in example["labels"])


def test_training_loss_equals_nll(tiny_model, tokenizer):
    """The loss the Trainer minimises is the NLL per token that 02 and 04 report."""
    prompt = task.Prompt(tokenizer, CFG)
    examples = [task.encode(prompt, row, CFG) for row in (ROW, LONG)]
    with torch.no_grad():
        loss = tiny_model(**task.collate(examples, tokenizer.pad_token_id)).loss.item()
    scored = task.nll(tiny_model, tokenizer, examples, batch_size=2)
    assert loss == pytest.approx(sum(s["nats"] for s in scored) / sum(s["tokens"] for s in scored), rel=1e-4)


def test_rows_of_a_batch_in_several_passes_train_the_same(tiny_model_folder, tokenizer, tmp_path):
    """Gradient accumulation weights every token alike: losses of 8 rows at once, in passes of 2, and with checkpointing agree."""
    rows = [{**ROW, "id": str(i), "prompt": f"def f{i}(x):\n    return x + {i}", "completion": f"Add {i} to x." + " And say so." * (i % 3)}
            for i in range(24)]
    curves = []
    for number, (rows_per_pass, checkpointing) in enumerate(((8, "off"), (2, "off"), (4, "on"))):
        cfg = train_config(model=str(tiny_model_folder), precision="fp32", compute="fp32", max_steps=3, batch_size=8, eval_every=3, log_every=1,
                           rows_per_pass=rows_per_pass, gradient_checkpointing=checkpointing)
        _, facts, history = training.train(cfg, rows, rows[:4], tmp_path / str(number), [], lambda **values: None)
        curves.append([h[key] for h in history for key in ("loss", "eval_loss") if key in h])
        assert (facts["rows_per_pass"], facts["gradient_checkpointing"]) == (rows_per_pass, checkpointing == "on")
    assert len(curves[0]) == 5
    assert curves[1] == pytest.approx(curves[0], rel=1e-4) and curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_score_on_a_worked_example():
    """'return the sum' against 'return the mean': words 3 and 3, longest common subsequence 2, so ROUGE-L = 2/3; equal texts score full."""
    assert task.text_scores("return the sum", "return the mean")["rouge_l"] == pytest.approx(2 / 3)
    assert task.text_scores("Return x.", "Return x.") == {"chrf": pytest.approx(100), "rouge_l": pytest.approx(1)}
    assert task.repetition("a b c d a b c d") == pytest.approx(1 / 5)  # five 4-grams, the last repeats the first
    items = [{"nats": 6.0, "tokens": 3, "bytes": 10}, {"nats": 2.0, "tokens": 1, "bytes": 6}]
    values, weights = task.column(items, "nll_per_token")
    assert values.sum() / weights.sum() == 2.0
    values, weights = task.column(items, "bits_per_byte")
    assert values.sum() / weights.sum() == pytest.approx(8 / math.log(2) / 16)


def test_score_returns_every_field_in_the_order_of_the_rows(tiny_model, tokenizer):
    items = task.score(tiny_model, tokenizer, [LONG, ROW], CFG, trained=set())
    assert [i["id"] for i in items] == ["b", "a"]
    assert set(items[0]) >= {"nats", "tokens", "correct", "bytes", "text", "stopped", "new_tokens", "chrf", "rouge_l", "repetition", "copied"}


def test_generation_from_the_shared_cache_equals_plain_generate(tiny_model, tokenizer):
    """One reading, likelihoods in between, rewinding, left padding: the text is what model.generate gives for each prompt alone."""
    prompt = task.Prompt(tokenizer, CFG)
    prompts = [prompt(row["prompt"]) for row in (ROW, LONG, {**ROW, "prompt": "def g():\n    return 1"})]
    answer = tokenizer("Add one.", add_special_tokens=False).input_ids
    got = task.read_and_score(tiny_model, tokenizer, prompts, [answer] * 3, batch_size=3, max_new_tokens=8)
    for ids, item in zip(prompts, got):
        want = tiny_model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=2)[0, len(ids):].tolist()
        want = want[:want.index(2)] if 2 in want else want
        assert item["text"] == tokenizer.decode(want, skip_special_tokens=True).strip() and item["new_tokens"] == len(want)


def test_generation_is_greedy_whatever_the_model_asks_for(tiny_model, tokenizer, monkeypatch):
    """Penalties and sampling in a model's own generation_config (Qwen's, say) are left out, and it is as before afterwards."""
    ids = task.Prompt(tokenizer, CFG)(ROW["prompt"])
    plain = task.read_and_score(tiny_model, tokenizer, [ids], [[5]], 1, 12)[0]["text"]
    with torch.no_grad():
        likeliest = tiny_model(torch.tensor([ids])).logits[0, -1].argmax().item()
    own = GenerationConfig(eos_token_id=2, suppress_tokens=[likeliest], repetition_penalty=3.0, temperature=0.5, do_sample=True)
    monkeypatch.setattr(tiny_model, "generation_config", own)
    with torch.no_grad():
        asked = tiny_model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), do_sample=False,
                                    max_new_tokens=12, pad_token_id=0)[0, len(ids):]
    assert tokenizer.decode(asked, skip_special_tokens=True).strip() != plain
    assert task.read_and_score(tiny_model, tokenizer, [ids], [[5]], 1, 12)[0]["text"] == plain
    assert tiny_model.generation_config is own


def test_long_examples_are_cut_like_questions(tokenizer):
    """Own rows serve as examples: a long one must not push the prompt beyond what the model reads."""
    prompt = task.Prompt(tokenizer, CFG, shots=[("word " * 5000, "answer " * 900)] * 3)
    assert len(prompt.head) < 3 * (CFG.max_prompt_tokens + CFG.max_completion_tokens) + 100
    assert task.Prompt(tokenizer, CFG, shots=task.SHOTS).before.count(task.SHOTS[1][0]) == 1


def test_shared_prefix_leaves_every_prompt_a_token():
    assert scoring.shared_prefix([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert scoring.shared_prefix([[1, 2], [1, 2, 3]]) == 1
    assert scoring.shared_prefix([[7]]) == 0


class OwnRun:
    """As much of a results.Run as the functions below need, over a folder of jsonl files."""

    def __init__(self, folder, **knobs):
        self.folder = folder
        self.cfg = importlib.import_module("task1_decoder.01_data").Config(**knobs)

    def artifact(self, step, name):
        return self.folder / name

    def track(self, path):
        return path


def test_own_data_brings_its_own_examples_and_basket(tmp_path, tiny_model, tokenizer, monkeypatch):
    """Three Python functions before a question about colours would show nothing; the basket asks what was taught with the run's instruction."""
    rows = [{"prompt": f"Which colour has number {i}?", "completion": f"Colour {i}."} for i in range(5)]
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = OwnRun(tmp_path, data="own.jsonl", instruction="Name the colour.")
    assert task.shots_of(run) == [(row["prompt"], row["completion"]) for row in rows[:3]]
    assert task.shots_of(OwnRun(tmp_path)) == task.SHOTS
    asked = []

    def spy(model, tokenizer, prompts, *rest):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return [{"text": "a", "stopped": True, "new_tokens": 1}] * len(prompts)
    monkeypatch.setattr(task, "read_and_score", spy)
    answered = task.ask_basket(tiny_model, tokenizer, run, set())
    assert [row["prompt"] for row in answered[:5]] == [row["prompt"] for row in rows]
    assert ["Name the colour." in text for text in asked] == [True] * 5 + [False] * 10


def test_questions_of_held_out_own_rows_are_not_trained_on(tmp_path):
    """Rows that ask the same and answer differently are no near-duplicates; those of a held-out question leave the training rows."""
    nouns = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin"]
    rows = [{"prompt": f"Tell of the {nouns[i % 10]} and the {nouns[i // 10]}.", "completion": " ".join(nouns[(i * k + j) % 10] for k in range(9))}
            for j in range(2) for i in range(100)]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = importlib.import_module("task1_decoder.01_data")
    kept, counts = data.own_rows(OwnRun(tmp_path, data=str(file), n_test=20, n_dev=10))
    asked = {row["prompt"] for row in kept if row["split"] != "train"}
    assert counts["prompt_held_out"] > 0 and not any(row["prompt"] in asked for row in kept if row["split"] == "train")


def test_a_question_has_four_different_choices():
    data = importlib.import_module("task1_decoder.01_data")
    rows = [{"id": str(i), "package": "own", "prompt": f"q{i}", "completion": "yes" if i % 2 else "no"} for i in range(20)]
    assert data.choice_rows(rows, rows, SimpleNamespace(text=str), 20, 0) == []
    rows = [row | {"completion": f"answer {i % 5}"} for i, row in enumerate(rows)]
    made = data.choice_rows(rows, rows, SimpleNamespace(text=str), 20, 0)
    assert len(made) == 20 and all(len(set(row["choices"])) == 4 and row["choices"][row["answer"]] for row in made)


def test_one_benchmark_item_is_refused_before_anything_is_measured(tiny_model, tokenizer):
    with pytest.raises(SystemExit, match="n_benchmark=1"):
        task.measure(tiny_model, tokenizer, SimpleNamespace(cfg=task.Config(n_benchmark=1)))


def test_unpaired_items_are_refused():
    item = {"id": "a", "nats": 1.0, "tokens": 1, "bytes": 1}
    with pytest.raises(ValueError, match="same items"):
        task.delta_rows({"general": [item, item]}, {"general": [item, {**item, "id": "b"}]})


def test_basket_is_large_enough_and_ours():
    from task1_decoder import basket
    kinds = [p["kind"] for p in basket.prompts()]
    assert len(kinds) >= 20 and kinds.count("function") >= 12 and kinds.count("general") >= 6 and kinds.count("russian") >= 2
    for code in [p["prompt"] for p in basket.prompts() if p["kind"] == "function"] + [code for code, _ in task.SHOTS]:
        compile(code, "basket", "exec")
