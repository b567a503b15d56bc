"""Prompt, label mask, padding and scores of task 1."""

import importlib
import math
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from common import stats
from pipeline import results
from sources import corpus
from task1_decoder import basket, rehearsal, scoring, task
from tests.decoders import with_tokenizer

CFG = task.Config()
ROW = {"id": "a", "prompt": task.SHOTS[2][0], "completion": task.SHOTS[2][1]}
LONG = {
    "id": "b",
    "prompt": "def f(x):\n" + "    x = x + 1\n" * 200,
    "completion": "Add one to x two hundred times.",
}
data, train, evaluate = (
    importlib.import_module(f"task1_decoder.{name}") for name in ("01_data", "03_train", "04_eval")
)


def silent(**values):
    pass


def numbered(n: int, kind: str) -> list[dict]:
    return [{"id": f"{kind}{i}", "prompt": [0] * (1 + i % 7), "answer": [1]} for i in range(n)]


def test_rehearsed_rows_are_spread_over_the_training_and_take_the_place_of_others():
    cfg = train.Config(max_steps=10, batch_size=4, bucket=2)
    rows, general = numbered(30, "own"), numbered(5, "general")
    ids = [example["id"] for example in train.schedule(rows, cfg, general)]
    assert len(ids) == 40 and {f"general{i}" for i in range(5)} < set(ids)
    assert sum(name.startswith("general") for name in ids) == 5
    assert {row["id"] for row in rows} < set(ids)  # one epoch and five rows of the next
    assert 0 < sum(name.startswith("general") for name in ids[:20]) < 5


def test_rehearsal_is_the_base_s_own_answers_drawn_by_seed(tiny_model_folder, tmp_path):
    """As many as the share says; the same seed draws the same, another one others."""
    def rehearsed(**knobs):
        cfg = train.Config(model=str(tiny_model_folder), compute="fp32", max_steps=5, batch_size=8,
                           max_completion_tokens=6, **knobs)
        for file in tmp_path.glob("*.json"):
            file.unlink()
        return rehearsal.rows(SimpleNamespace(folder=tmp_path, track=silent_path), cfg)
    def silent_path(path):
        assert path == rehearsal.QUESTIONS
    rows = rehearsed(rehearsal=0.1)
    prompts = {row["prompt"] for row in results.read_rows(rehearsal.QUESTIONS)}
    assert len(rows) == 4 and {row["prompt"] for row in rows} < prompts
    assert rehearsed(rehearsal=0.1) == rows and rehearsed(rehearsal=0.1, seed=1) != rows
    assert rehearsed(rehearsal=0.0) == []


def test_a_base_is_chosen_by_its_held_out_likelihood():
    def measured(nats):
        return {"heldout": [{"nats": nats, "tokens": 2}], "general": []}
    assert task.best_base({"a": measured(3), "b": measured(2), "c": measured(4)}) == "b"
    names = [{"name": "networkx.algorithms.cycles.simple_cycles", "package": "networkx"},
             {"name": "sklearn.base.clone", "package": "sklearn"}]
    assert corpus.subpackages(names) == ["networkx.algorithms.cycles", "sklearn.base.clone"]
    assert corpus.subpackages([{"name": "row 1", "package": "own"}]) is None


def scored(model, tokenizer, rows, batch_size=40, **more):
    return scoring.score_answers(model, tokenizer, task.encode(tokenizer, rows, CFG), batch_size, **more)


def test_prompt_is_the_chat_template(tokenizer):
    turns = [{"role": "system", "content": CFG.instruction}, {"role": "user", "content": ROW["prompt"]}]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    prompt = task.Prompt(tokenizer, CFG)
    assert prompt(ROW["prompt"]) == tokenizer(expected, add_special_tokens=False).input_ids
    assert prompt.text(ROW["prompt"]) == expected


def test_a_long_prompt_is_shortened_inside_the_user_text_only(tokenizer):
    prompt = task.Prompt(tokenizer, CFG)
    ids = prompt(LONG["prompt"])
    assert len(ids) == len(prompt.head) + CFG.max_prompt_tokens + len(prompt.tail)
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_an_answer_closes_with_eos_unless_it_is_too_long(tokenizer):
    (example,) = task.encode(tokenizer, [ROW], CFG)
    assert tokenizer.decode(example["answer"]) == ROW["completion"] + tokenizer.eos_token
    (shortened,) = task.encode(tokenizer, [ROW], task.Config(max_completion_tokens=4))
    assert shortened["answer"] == example["answer"][:4]


def test_labels_are_exactly_the_answers_though_padding_differs_in_length(tokenizer):
    examples = task.encode(tokenizer, [ROW, LONG], CFG)
    batch = task.collate(examples, tokenizer.pad_token_id)
    assert batch["labels"].shape == (2, batch["logits_to_keep"])
    for example, labels, ids, mask in zip(
        examples, batch["labels"], batch["input_ids"], batch["attention_mask"]
    ):
        answer = example["answer"]
        assert labels.tolist() == [-100] * (len(labels) - len(answer)) + answer
        assert ids[mask == 1].tolist() == example["prompt"] + example["answer"]


def test_nll_equals_the_sum_computed_row_by_row(tiny_model, tokenizer):
    """Padding, sliced logits and batching change nothing: compare with one unpadded row and full logits."""
    rows = [ROW, LONG, {**ROW, "completion": "Yes."}]
    for example, item in zip(task.encode(tokenizer, rows, CFG), scored(tiny_model, tokenizer, rows, 3)):
        ids, answer = torch.tensor([example["prompt"] + example["answer"]]), torch.tensor(example["answer"])
        with torch.no_grad():
            logits = tiny_model(ids).logits[0, len(example["prompt"]) - 1 : -1].float()
        nats = torch.nn.functional.cross_entropy(logits, answer, reduction="sum").item()
        assert item["nats"] == pytest.approx(nats, rel=1e-4)
        assert item["tokens"] == len(answer) and item["correct"] == (logits.argmax(1) == answer).sum()


def test_the_most_probable_tokens_count_as_right(tiny_model, tokenizer):
    """The model's own greedy answer with another last token: all but that one."""
    (example,) = task.encode(tokenizer, [ROW], CFG)
    ids = torch.tensor([example["prompt"]])
    new = tiny_model.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=0, eos_token_id=2)
    answer = new[0, ids.shape[1] :].tolist()
    answer[-1] += 1
    (item,) = scoring.score_answers(tiny_model, tokenizer, [example | {"answer": answer}], 1)
    assert item["correct"] == item["tokens"] - 1 > 0


def test_training_loss_equals_nll(tiny_model, tokenizer):
    """The loss the Trainer minimises is the NLL per token that 02 and 04 report."""
    examples = task.encode(tokenizer, [ROW, LONG], CFG)
    with torch.no_grad():
        loss = tiny_model(**task.collate(examples, tokenizer.pad_token_id)).loss.item()
    assert loss == pytest.approx(task.nll(scored(tiny_model, tokenizer, [ROW, LONG])), rel=1e-4)


def test_rows_of_a_batch_in_several_passes_train_the_same(tiny_model_folder, tokenizer, tmp_path):
    """Accumulation weights every token alike: losses of 8 rows at once, in passes of 2, and checkpointed
    agree.
    """
    rows = [
        {
            "id": str(i),
            "prompt": f"def f{i}(x):\n    return x + {i}",
            "completion": f"Add {i} to x." + " And say so." * (i % 3),
        }
        for i in range(24)
    ]
    curves = []
    for number, (rows_per_pass, checkpointing) in enumerate(((8, "off"), (2, "off"), (4, "on"))):
        cfg = train.Config(
            model=str(tiny_model_folder),
            precision="fp32",
            compute="fp32",
            max_steps=3,
            batch_size=8,
            eval_every=3,
            log_every=1,
            rows_per_pass=rows_per_pass,
            gradient_checkpointing=checkpointing,
        )
        _, trained, history = train.train(cfg, rows, rows[:4], tmp_path / str(number), "", silent)
        curves.append([h[key] for h in history for key in ("loss", "eval_loss") if key in h])
        assert (trained["rows_per_pass"], trained["gradient_checkpointing"]) == (
            rows_per_pass,
            checkpointing == "on",
        )
    assert len(curves[0]) == 5
    assert curves[1] == pytest.approx(curves[0], rel=1e-4) and curves[2] == pytest.approx(curves[0], rel=1e-4)


def test_score_on_a_worked_example():
    """'return the sum' against 'return the mean': 3 words each, longest common subsequence 2, so ROUGE-L =
    2/3.
    """
    assert task.text_scores("return the sum", "return the mean", set())["rouge_l"] == pytest.approx(2 / 3)
    assert task.text_scores("Return x.", "Return x.", {"return x"}) == {
        "chrf": pytest.approx(100),
        "rouge_l": pytest.approx(1),
        "repetition": 0,
        "copied": True,
    }
    repeated = task.text_scores("a b c d a b c d", "", set())  # five 4-grams, the last repeats the first
    assert repeated["repetition"] == pytest.approx(1 / 5) and not repeated["copied"]
    items = [
        {"id": 1, "nats": 6.0, "tokens": 3, "bytes": 10},
        {"id": 2, "nats": 2.0, "tokens": 1, "bytes": 6},
    ]
    values = [row["value"] for row in stats.rows_of("x", "base", items, task.TABLES["general"])]
    assert values == [2.0, pytest.approx(8 / math.log(2) / 16)] and task.nll(items) == 2.0


def test_a_metric_is_one_entry(tiny_model, tokenizer):
    """What is added to METRICS alone appears in 04's rows, deltas and verdicts of held-out texts."""
    before = task.score(tiny_model, tokenizer, [ROW, LONG], CFG, set())
    after = [item | {"text": ""} for item in before]
    words = stats.Metric("words", "words written", lambda item: len(item["text"].split()), better="lower")
    task.METRICS.append(words)
    try:
        row = stats.rows_of("heldout", "base", before, task.TABLES["heldout"])[-1]
        delta = evaluate.compared("delta", {"heldout": before}, {"heldout": after})[-1]
    finally:
        task.METRICS.remove(words)
    assert (row["metric"], row["label"]) == ("words", "words written")
    assert row["value"] == sum(len(item["text"].split()) for item in before) / 2
    assert delta["value"] == -row["value"] and delta["verdict"] is not None


def test_score_returns_every_field_in_the_order_of_the_rows(tiny_model, tokenizer):
    items = task.score(tiny_model, tokenizer, [LONG, ROW], CFG, trained=set())
    assert [item["id"] for item in items] == ["b", "a"]
    assert len(stats.rows_of("heldout", "base", items, task.METRICS)) == len(task.METRICS)


def test_generation_from_the_shared_cache_equals_plain_generate(tiny_model, tokenizer):
    """One reading, likelihoods in between, rewinding, left padding: the text is that of each prompt alone."""
    rows = [ROW, LONG, {**ROW, "prompt": "def g():\n    return 1"}]
    items = scored(tiny_model, tokenizer, rows, max_new_tokens=8)
    for example, item in zip(task.encode(tokenizer, rows, CFG), items):
        ids = torch.tensor([example["prompt"]])
        new = tiny_model.generate(ids, do_sample=False, max_new_tokens=8, pad_token_id=0, eos_token_id=2)
        new = new[0, ids.shape[1] :].tolist()
        new = new[: new.index(2)] if 2 in new else new
        assert item["text"] == tokenizer.decode(new, skip_special_tokens=True).strip()
        assert item["new_tokens"] == len(new)


def test_generation_is_greedy_whatever_the_model_asks_for(tiny_model, tokenizer, monkeypatch):
    """Penalties and sampling in a model's own generation_config are left out, and it is as before
    afterwards.
    """
    plain = scored(tiny_model, tokenizer, [ROW], max_new_tokens=12)[0]["text"]
    ids = torch.tensor([task.Prompt(tokenizer, CFG)(ROW["prompt"])])
    with torch.no_grad():
        likeliest = tiny_model(ids).logits[0, -1].argmax().item()
    own = GenerationConfig(
        eos_token_id=2, suppress_tokens=[likeliest], repetition_penalty=3.0, do_sample=True
    )
    monkeypatch.setattr(tiny_model, "generation_config", own)
    asked = tiny_model.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=0)[0, ids.shape[1] :]
    assert tokenizer.decode(asked, skip_special_tokens=True).strip() != plain
    assert scored(tiny_model, tokenizer, [ROW], max_new_tokens=12)[0]["text"] == plain
    assert tiny_model.generation_config is own


def test_long_examples_are_shortened_like_questions(tokenizer):
    """Own rows serve as examples: a long one must not push the prompt beyond what the model reads."""
    prompt = task.Prompt(tokenizer, CFG, shots=[("word " * 5000, "answer " * 900)] * 3)
    assert len(prompt.head) < 3 * (CFG.max_prompt_tokens + CFG.max_completion_tokens) + 100
    assert task.Prompt(tokenizer, CFG, shots=task.SHOTS).before.count(task.SHOTS[1][0]) == 1


def test_shared_prefix_leaves_every_prompt_a_token():
    assert scoring.shared_prefix([[1, 2, 3, 4], [1, 2, 5]]) == 2
    assert scoring.shared_prefix([[1, 2], [1, 2, 3]]) == 1
    assert scoring.shared_prefix([[7]]) == 0


def own_run(folder, **knobs):
    """As much of a runner.Run as the functions below need, over a folder of jsonl files."""
    return SimpleNamespace(
        cfg=data.Config(**knobs), artifact=lambda step, name: folder / name, track=lambda path: path,
        rows=lambda split: results.read_rows(folder / f"{split}.jsonl")
    )


def test_own_data_brings_its_own_examples_and_basket(tmp_path):
    """Three Python functions before a question about colours would show nothing."""
    rows = [
        {"id": f"row{i}", "prompt": f"Which colour has {i}?", "completion": f"Colour {i}."} for i in range(5)
    ]
    for name in ("train", "dev"):
        results.write_rows(tmp_path / f"{name}.jsonl", rows)
    run = own_run(tmp_path, data="own.jsonl", instruction="Name the colour.")
    assert task.shots_of(run) == [(row["prompt"], row["completion"]) for row in rows[:3]]
    assert task.shots_of(own_run(tmp_path)) == task.SHOTS
    asked = basket.prompts(run)
    assert [row["prompt"] for row in asked[:5]] == [row["prompt"] for row in rows]
    assert [row["taught"] for row in asked] == [True] * 5 + [False] * 10


def test_the_basket_asks_with_the_runs_instruction_only_what_is_taught(
    tiny_model, tokenizer, tmp_path, monkeypatch
):
    from task1_decoder import harness

    instructions = []

    def spy(model, tokenizer, rows, cfg, trained, shots=()):
        instructions.extend([cfg.instruction] * len(rows))
        return [{"id": row["id"], "nats": 1.0, "tokens": 1} for row in rows]

    for name in ("train", "test", "choice"):
        results.write_rows(tmp_path / f"{name}.jsonl", [ROW])
    monkeypatch.setattr(task, "score", spy)
    monkeypatch.setattr(harness, "evaluate", lambda *arguments, **more: {})
    run = own_run(tmp_path, instruction="Say it.", n_general=2)
    run.log = silent
    task.measure(tiny_model, tokenizer, run)
    taught = [row["taught"] for row in basket.prompts(run)]
    assert instructions[1:] == ["Say it." if one else "" for one in taught]


def test_questions_of_held_out_own_rows_are_not_trained_on(tmp_path):
    """Rows that ask the same and answer differently are no near-duplicates: those of a held-out question
    go.
    """
    nouns = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin"]
    file = tmp_path / "own.jsonl"
    results.write_rows(
        file,
        [
            {
                "prompt": f"Tell of the {nouns[i % 10]} and the {nouns[i // 10]}.",
                "completion": " ".join(nouns[(i * k + j) % 10] for k in range(9)),
            }
            for j in range(2)
            for i in range(100)
        ],
    )
    run = own_run(tmp_path, data=str(file), n_test=20, n_dev=10, instruction="")
    kept, counts = data.own_rows(run)
    held_out = {row["prompt"] for row in kept if row["split"] != "train"}
    assert counts["prompt_held_out"] > 0
    assert not any(row["prompt"] in held_out for row in kept if row["split"] == "train")


def test_training_rows_that_repeat_held_out_ones_stop_the_run():
    splits = {"train": [ROW], "dev": [LONG], "test": [{**ROW, "prompt": "def g(): return 1"}]}
    with pytest.raises(SystemExit, match="nothing was written"):
        data.leaks(splits, own=False)
    assert not any(data.leaks({"train": [ROW], "dev": [LONG], "test": [LONG]}, own=False).values())
    # of own rows an answer may repeat, a question may not
    splits["test"] = [{**ROW, "prompt": "And where does the river end?"}]
    assert not any(data.leaks(splits, own=True).values())
    with pytest.raises(SystemExit, match="nothing was written"):
        data.leaks(splits | {"test": [{**ROW, "completion": "Something else altogether."}]}, own=True)


CHATS = [
    {
        "id": "a",
        "prompt": "And then?",
        "completion": "C.",
        "turns": [("First?", "One."), ("Second?", "Two.")],
        "instruction": "Be brief.",
    },
    {"id": "b", "prompt": "Hi?", "completion": "Hello.", "turns": [], "instruction": ""},
]


def rendered(tokenizer, *messages):
    turns = [{"role": role, "content": text} for role, text in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def test_chats_are_asked_as_the_template_writes_them(tokenizer):
    """With their own system message, and without the instruction that belongs to the corpus."""
    prompt = task.Prompt(tokenizer, task.Config(data="own.jsonl"))
    whole = rendered(
        tokenizer,
        ("system", "Be brief."),
        *(("user", "First?"), ("assistant", "One."), ("user", "Second?"), ("assistant", "Two.")),
        ("user", "And then?"),
    )
    assert prompt.of(CHATS[0]).text("And then?") == whole
    encoded = prompt.encode(CHATS[0])
    assert tokenizer.decode(encoded["prompt"]) == whole and encoded["answer"][-1] == prompt.end
    assert prompt.of(CHATS[1]).text("Hi?") == rendered(tokenizer, ("user", "Hi?"))
    given = task.Prompt(tokenizer, task.Config(data="own.jsonl", instruction="Say it."))
    for row, system in zip(CHATS, ("Be brief.", "Say it.")):
        assert given.of(row).text("").startswith(rendered(tokenizer, ("system", system))[:40])
    shown = task.Prompt(tokenizer, task.Config(data="own.jsonl"), shots=[("Q?", "A.")]).of(CHATS[0])
    assert shown.before.index("Q?") < shown.before.index("First?") < shown.before.index("Second?")
    (example,) = task.encode(tokenizer, CHATS[:1], task.Config(data="own.jsonl"), [("Q?", "A.")])
    assert tokenizer.decode(example["prompt"]) == shown.text("And then?")


def test_the_oldest_turns_of_a_long_chat_go_first_and_no_marker_is_cut(tokenizer):
    texts = ["First? One.", "Second? Two.", "And then?"]
    room = [sum(len(tokenizer(text).input_ids) for text in texts[i:]) for i in range(3)]
    for limit, kept in ((room[0] + 1, 2), (room[1], 1), (room[1] - 2, 0), (1, 0)):
        cfg = task.Config(data="own.jsonl", max_prompt_tokens=limit)
        text = tokenizer.decode(task.Prompt(tokenizer, cfg).encode(CHATS[0])["prompt"])
        assert ("First?" in text, "Second?" in text) == (kept > 1, kept > 0), limit
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_start|>") == text.count("<|im_end|>") + 1 == 3 + 2 * kept


def test_a_model_without_template_says_so_for_chats(tokenizer):
    bare = with_tokenizer(tokenizer, "BOS")
    with pytest.raises(SystemExit, match="has no chat template for the messages"):
        task.encode(bare, CHATS, task.Config(data="own.jsonl"))


def test_chats_are_examples_and_questions_as_a_whole(tokenizer, tmp_path):
    results.write_rows(tmp_path / "train.jsonl", CHATS)
    shots = task.shots_of(own_run(tmp_path, data="own.jsonl"))
    assert [tuple(shot) for shot in shots] == [
        ("First?", "One."), ("Second?", "Two."), ("And then?", "C."), ("Hi?", "Hello.")
    ]
    rows = [row | {"package": "own", "completion": f"answer {i}"} for i, row in enumerate(CHATS * 3)]
    prompt = task.Prompt(tokenizer, task.Config(data="own.jsonl"))
    questions = data.choice_rows(rows, rows, prompt, 2, 0)
    assert [q["prompt"] for q in questions] == [prompt.of(row).text(row["prompt"]) for row in CHATS]


def test_own_chats_are_split_without_copies(tmp_path):
    """The same last question after other turns is another question; the same whole chat is not."""
    nouns = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin"]

    def chat(i, answer):
        texts = f"Tell of the {nouns[i % 10]} and the {nouns[i // 10]}.", f"It is {i * 37}.", "Why?", answer
        roles = ("user", "assistant") * 2
        return {"chat": [{"role": role, "content": text} for role, text in zip(roles, texts)]}

    own = [chat(i, f"Of number {i * i}.") for i in range(100)]
    again = [chat(i, f"No {i}, but not so.") for i in range(50)]
    results.write_rows(tmp_path / "own.jsonl", own + own[:7] + again)
    file = str(tmp_path / "own.jsonl")
    run = own_run(tmp_path, data=file, columns="messages=chat", n_test=30, n_dev=10)
    kept, counts = data.own_rows(run)
    assert counts["parsed"] == 157 and counts["repeated"] == 7
    assert counts["kept"] - counts["prompt_held_out"] == len(kept) > 100 and counts["prompt_held_out"] > 0
    splits = {split: [row for row in kept if row["split"] == split] for split in ("train", "dev", "test")}
    assert not any(data.leaks(splits, own=True).values())
    assert all(row["turns"] and row["prompt"] == "Why?" for row in kept)


def test_a_question_has_four_different_choices():
    rows = [
        {"id": str(i), "package": "own", "prompt": f"q{i}", "completion": f"answer {i % 2}"}
        for i in range(20)
    ]
    prompt = SimpleNamespace(of=lambda row: SimpleNamespace(text=str))
    assert data.choice_rows(rows, rows, prompt, 20, 0) == []
    rows = [row | {"completion": f"answer {i % 5}"} for i, row in enumerate(rows)]
    made = data.choice_rows(rows, rows, prompt, 20, 0)
    assert len(made) == 20
    for row, question in zip(rows, made):
        assert (
            len(set(question["choices"])) == 4
            and question["choices"][question["answer"]] == row["completion"]
        )


def test_one_benchmark_item_is_refused_before_anything_is_measured(tiny_model, tokenizer):
    with pytest.raises(SystemExit, match="n_benchmark=1"):
        task.measure(tiny_model, tokenizer, SimpleNamespace(cfg=task.Config(n_benchmark=1)))


def test_functions_of_ours_are_python(tmp_path):
    asked = basket.prompts(own_run(tmp_path))
    for code in [row["prompt"] for row in asked if row["kind"] == "function"] + [
        code for code, _ in task.SHOTS
    ]:
        compile(code, "basket", "exec")
    assert [row["id"] for row in asked] == list(range(len(asked)))
