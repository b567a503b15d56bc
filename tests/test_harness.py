"""Our lm-eval model against the stock one, and the sample of benchmark items."""

import json
from types import SimpleNamespace

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from task1_decoder import harness, task

REQUESTS = [
    ("The sky is", " blue"),
    ("The sky is", " very deep green today"),
    ("Question: two plus two?\nAnswer:", " four"),
    ("Question: two plus two?\nAnswer:", " five"),
    ("A", " B C D"),
]


def test_log_likelihoods_equal_stock_hflm(tiny_model, tokenizer):
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(REQUESTS)]
    ours = harness.HarnessLM(tiny_model, tokenizer, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    stock = HFLM(
        pretrained=tiny_model, tokenizer=tokenizer, batch_size=2, softmax_dtype="float32"
    ).loglikelihood(requests, disable_tqdm=True)
    for (mine, greedy), (theirs, stock_greedy) in zip(ours, stock):
        assert mine == pytest.approx(theirs, rel=1e-4) and greedy == stock_greedy


def test_an_untied_head_survives(tiny_model_folder, tokenizer):
    from common import models

    model = models.load_decoder(str(tiny_model_folder), "fp32")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    before = model.lm_head.weight.clone()
    harness.HarnessLM(model, tokenizer, batch_size=2)
    assert torch.equal(model.lm_head.weight, before) and "tie_weights" not in model.__dict__


def test_sample_is_seeded_spread_and_without_repeats():
    chosen = harness.sample(10_042, 100)
    assert chosen == harness.sample(10_042, 100) and len(set(chosen)) == 100
    assert max(chosen) > 9_000 and min(chosen) < 1_000


def test_every_benchmark_runs_on_stock_definitions(tiny_model, tokenizer, tmp_path):
    choice = tmp_path / "choice.jsonl"
    choice.write_text(
        "".join(
            json.dumps({"prompt": f"q{i}", "choices": ["a", "b", "c", "d"], "answer": i % 4}) + "\n"
            for i in range(4)
        )
    )
    numpy_state, torch_state = harness.np.random.get_state()[1].copy(), torch.get_rng_state()
    found = harness.evaluate(tiny_model, tokenizer, choice, n=2, batch_size=2)
    assert {name: len(items) for name, items in found.items()} == dict.fromkeys(
        ("arc_easy", "piqa", "hellaswag", "sciq", "docstring_choice"), 2
    )
    assert [i["id"] for i in found["hellaswag"]] == harness.sample(10_042, 2)
    assert (harness.np.random.get_state()[1] == numpy_state).all() and torch.equal(
        torch.get_rng_state(), torch_state
    )


MINE = """
task: mine
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: items.jsonl}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
{more}
"""
CHOICE = "doc_to_choice: '{{a}}'\ndoc_to_target: right"
WRITE = "doc_to_target: '{{a[0]}}'\ngeneration_kwargs: {until: ['.'], max_gen_toks: 3}"
EXACT = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"


WORDS = ("sky", "sea", "sun")


def own_task(folder, kind="multiple_choice", more=CHOICE, **changed):
    items = [{"q": f"The {word} is", "a": ["blue", "deep green"], "right": 1} for word in WORDS]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    text = MINE.format(kind=kind, more=more)
    for old, new in changed.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


@pytest.mark.parametrize(("kind", "more", "better"), [
    ("multiple_choice", CHOICE, {"acc": True, "acc_norm": True}),
    ("loglikelihood", "doc_to_target: '{{a[0]}}'\nmetric_list: [{metric: acc, aggregation: mean}]",
     {"acc": True}),
    ("generate_until", f"{WRITE}\n{EXACT}", {"exact_match": True})])
def test_a_benchmark_of_the_users_own_is_scored(
    tiny_model, tokenizer, tmp_path, monkeypatch, kind, more, better
):
    monkeypatch.setattr(harness, "stock_and_ours", lambda choice_file: [])
    monkeypatch.chdir(tmp_path)
    own_task(tmp_path, kind, more)
    own, files = harness.own_benchmark("mine.yaml")
    assert own.higher_is_better() == better and files == [tmp_path / "mine.yaml", tmp_path / "items.jsonl"]
    run = SimpleNamespace(cfg=task.Config(benchmark="mine.yaml"), track=(tracked := []).append)
    metrics = task.tables_of(run)["own mine"]
    assert [(m.name, m.better, m.binary) for m in metrics] == [(name, "higher", True) for name in better]
    assert tracked == files
    items = harness.evaluate(tiny_model, tokenizer, None, 0, 2, benchmark="mine.yaml")["own mine"]
    assert [item["id"] for item in items] == [0, 1, 2]
    stock = HFLM(pretrained=tiny_model, tokenizer=tokenizer, batch_size=2, softmax_dtype="float32")
    prompts = [f"The {word} is" for word in WORDS]

    def likelihoods(answer):
        return stock.loglikelihood([Instance("loglikelihood", {}, (q, answer), 0) for q in prompts], True)
    if kind == "multiple_choice":
        blue, green = likelihoods(" blue"), likelihoods(" deep green")
        assert [item["acc"] for item in items] == [float(g > b) for (b, _), (g, _) in zip(blue, green)]
    if kind == "loglikelihood":
        assert [item["acc"] for item in items] == [float(greedy) for _, greedy in likelihoods(" blue")]
    if kind == "generate_until":
        assert {item["exact_match"] for item in items} <= {0, 1}


@pytest.mark.parametrize(("changed", "words"), [
    ({"items.jsonl": "none.jsonl"}, "FileNotFoundError"),
    ({"task: mine": "name: mine"}, "KeyError: 'task'"),
    ({"{{q}}": "{{question}}"}, "'question' is undefined"),
    ({"multiple_choice": "choices"}, "invalid output_type 'choices'"),
    ({"test_split: test": "test_split: dev"}, "dev"),
    ({"dataset_kwargs": "kwargs"}, "KeyError: 'dataset_kwargs'"),
    ({"task: mine": "task: [mine"}, "ParserError"),
    ({"doc_to_target: right": "doc_to_target: right\nmetric_list: [{metric: f1, aggregation: f1}]"},
     "aggregation: mean")])
def test_a_wrong_benchmark_is_one_line(tmp_path, changed, words):
    with pytest.raises(SystemExit) as stop:
        harness.own_benchmark(own_task(tmp_path, **changed))
    said = str(stop.value)
    assert said.startswith(f"BENCHMARK={tmp_path}") and words in said and len(said.splitlines()) == 1, said
