"""Task 3 with other decoders: it measures what the model itself computes, before and after training.

Weights are random and large, so that caps, scales, biases and windows matter: a score without one is far off.
"""

import importlib
import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import models
from task3_tokenizer import task, vocabulary
from tests import test_pipeline3
from tests.decoders import DECODERS, save_decoder

training = importlib.import_module("task3_tokenizer.03_train")
COMMON = ("Gemma-3",)  # make test takes this one, make test-all every one
EACH = [name if name in COMMON else pytest.param(name, marks=pytest.mark.all)
        for name in DECODERS if name != "Mixtral"]
TERMS = ["NetworkX", "undirected"]
TEXTS = [" The NetworkX library draws an undirected graph of all nodes that are near to each other in a "
         "plane, with their names, which is not always easy.",
         " An undirected edge of it", " In NetworkX a graph may have many edges between the same two nodes."]
ROWS = [{"term": str(number), "text": text} for number, text in enumerate(TEXTS)]


def config(model, **more):
    return training.Config(model=str(model), compute="fp32", log_every=1, eval_batch_size=2, lora_r=4,
                           lora_alpha=8, **more)


def arm_of(old):
    new, pieces_of = vocabulary.extend(old, TERMS)
    return training.Arm("new", new, pieces_of, sorted(pieces_of))


def plain_nats(folder, texts: list[str]) -> list[float]:
    """Nats of each text by plain transformers, after what the tokenizer puts before a text, else EOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    nats = []
    for text in texts:
        ids = tokenizer(text).input_ids
        if ids == tokenizer(text, add_special_tokens=False).input_ids:
            ids = [tokenizer.eos_token_id, *ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        nats.append(-logits.log_softmax(1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item())
    return nats


def own_nats(folder, tokenizer) -> list[float]:
    model = models.load_decoder(str(folder), "fp32")
    return [item["nats"] for item in task.score(model, tokenizer, ROWS, 2)]


@pytest.mark.parametrize("name", EACH)
def test_scores_losses_and_checkpoints_are_those_of_the_plain_model(name, tokenizer, tmp_path):
    base = save_decoder(name, tokenizer, tmp_path / "base")
    old = models.load_tokenizer(str(base))
    cfg, arm = config(base), arm_of(old)
    assert own_nats(base, old) == pytest.approx(plain_nats(base, TEXTS), rel=1e-4)

    training.save_untrained(cfg, arm, tmp_path / "init", ROWS)
    plan = {"a": training.Stage(2, 3e-2), "c1": training.Stage(2, 3e-2, 3e-3, 1e-2, "attention"),
            "c2": training.Stage(2, 3e-2, 3e-3, 1e-2, "all-linear")}
    source, first_loss = "init", {}
    for target, stage in plan.items():
        stats = training.train_stage(cfg, arm, stage, tmp_path / source, tmp_path / target, ROWS * 2,
                                     len(ROWS), ROWS, lambda **values: None)
        first_loss[source], source = stats["losses"][0]["value"], target
    plain = {stage: plain_nats(tmp_path / stage, TEXTS) for stage in ("init", *plan)}
    for stage, nats in plain.items():
        assert own_nats(tmp_path / stage, arm.tokenizer) == pytest.approx(nats, rel=1e-4)
    tokens = sum(len(task.ids_of(arm.tokenizer, text)) for text in TEXTS)
    for stage, loss in first_loss.items():  # rows and matrices are parameters of their own there, with LoRA
        assert loss == pytest.approx(sum(plain[stage]) / tokens, rel=1e-4)
    assert sum(plain["c2"]) < sum(plain["init"]) - 1  # it learnt

    states = [AutoModelForCausalLM.from_pretrained(tmp_path / stage).state_dict() for stage in plan]
    in_c1, in_c2 = ({name for name in was if not torch.equal(was[name], now[name])}
                    for was, now in itertools.pairwise(states))
    linear = {f"{layer}.weight" for layer in models.linear_layers(models.load_decoder(str(base), "fp32"))}
    attention = {layer for layer in linear if "attn" in layer or "attention" in layer}
    assert 0 < len(attention) < len(linear)
    assert attention < in_c1 and len(in_c1 - attention) == 2  # and the two matrices
    assert linear < in_c2 and len(in_c2 - linear) == 2
    saved = json.loads((tmp_path / "c2" / "config.json").read_text())
    assert saved["use_cache"] and not saved["tie_word_embeddings"]


def test_a_new_entry_of_a_head_with_a_bias_has_the_mean_logit_of_its_pieces(tokenizer, tmp_path):
    base, arm = save_decoder("Phi", tokenizer, tmp_path / "base"), arm_of(tokenizer)
    training.save_untrained(config(base), arm, tmp_path / "init", ROWS)
    head = models.load_decoder(str(tmp_path / "init"), "fp32").get_output_embeddings()
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = head(hidden)
    for new_id, pieces in arm.pieces_of.items():
        assert torch.allclose(logits[:, new_id], logits[:, pieces].mean(1), atol=1e-4)


def test_a_text_starts_with_what_the_tokenizer_puts_there_else_with_eos(tokenizer, tmp_path, monkeypatch):
    with_bos = AutoTokenizer.from_pretrained(save_decoder("BOS", tokenizer, tmp_path), padding_side="left")
    assert task.start_ids(with_bos) == [1] and task.start_ids(vocabulary.extend(with_bos, TERMS)[0]) == [1]
    assert task.start_ids(tokenizer) == [tokenizer.eos_token_id] == [2]
    model, seen = models.load_decoder(str(tmp_path), "fp32"), []
    monkeypatch.setattr(model, "generate", lambda input_ids, **more: seen.append(input_ids) or input_ids)
    task.generate(model, with_bos, [TEXTS[1]], 4)
    assert seen[0].tolist() == [with_bos(TEXTS[1]).input_ids]


@pytest.mark.all  # 40 s each; make test takes a tied Llama through all steps, in test_pipeline3.py
@pytest.mark.parametrize("name", [name for name in DECODERS if name != "Mixtral"])
def test_all_four_steps_take_it_and_store_what_the_plain_model_gives(name, repo, tokenizer, tmp_path):
    folder, slug = save_decoder(name, tokenizer, tmp_path / "base"), f"decoder-{name.replace(' ', '-')}"
    arguments = ["--run", slug, *test_pipeline3.own_arguments(repo, folder), "compute=fp32"]
    for step in ("01_data", "02_baseline", "03_train", "04_eval"):
        test_pipeline3.finished(test_pipeline3.run(repo, step, *arguments))
    stored = repo / "runs" / slug / "task3_tokenizer"
    uses = test_pipeline3.term_windows(stored)
    texts = [row["text"] for row in uses]
    items = json.loads((stored / "items.json").read_text())
    for model, path in (("base", folder), ("new init", stored / "new" / "init"),
                        ("control c2", stored / "control" / "c2"), ("new c2", stored / "new" / "c2")):
        nats = [item["nats"] for item in items[model]["term windows"]]
        assert nats == pytest.approx(plain_nats(path, texts), rel=1e-4)
