"""Our lm-eval model against the stock one, and the sample of benchmark items."""

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from task1_decoder import harness

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
