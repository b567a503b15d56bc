"""Task 3 with other decoders: it measures what the model itself computes, before and after training.

Weights are random and large, so that caps, scales, biases and windows matter: a score without one is far off.
"""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import models
from task3_tokenizer import embeddings, task, training, vocabulary
from tests import test_pipeline3
from tests.conftest import one_line
from tests.decoders import DECODERS, save_decoder

COMMON = ("GPT-NeoX", "Gemma-3")  # make test takes these two, make test-all every one
EACH = [name if name in COMMON else pytest.param(name, marks=pytest.mark.all) for name in DECODERS if name != "Mixtral"]
TERMS = ["NetworkX", "undirected"]
TEXTS = [" The NetworkX library draws an undirected graph of all nodes that are near to each other in a "
         "plane, with their names, which is not always easy.",
         " An undirected edge of it", " In NetworkX a graph may have many edges between the same two nodes."]


def knobs(model, **more):
    values = dict(model=str(model), compute="fp32", seed=0, tied=False, init="mean of pieces",
                  weight_decay=0.0, warmup=0.1, schedule="cosine", max_grad_norm=1.0, log_every=1,
                  eval_batch_size=2, lora_r=4, lora_alpha=8, lora_dropout=0.0, attention="auto", mlp="auto")
    return SimpleNamespace(**values | more)


def plain_nats(folder, texts: list[str]) -> list[float]:
    """Nats of each text by plain transformers, after what the tokenizer puts before a text, else EOS."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    found = []
    for text in texts:
        ids = tokenizer(text).input_ids
        if ids == tokenizer(text, add_special_tokens=False).input_ids:
            ids = [tokenizer.eos_token_id, *ids]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1].double()
        found.append(-logits.log_softmax(1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item())
    return found


def own_nats(folder, tokenizer, texts: list[str]) -> list[float]:
    model = models.load_decoder(str(folder), "fp32")
    return [item["nats"] for item in task.score(model, tokenizer, [{"text": text} for text in texts], 2)]


@pytest.mark.parametrize("name", EACH)
def test_scores_losses_and_checkpoints_are_those_of_the_plain_model(name, tokenizer, tmp_path):
    base = save_decoder(name, tokenizer, tmp_path / "base")
    old = models.load_tokenizer(str(base))
    new, added = vocabulary.extend(old, TERMS)
    splits = vocabulary.spell(added, old.get_vocab())
    cfg, ids = knobs(base), sorted(splits)
    rows = [{"term": str(number), "text": text} for number, text in enumerate(TEXTS)]
    assert own_nats(base, old, TEXTS) == pytest.approx(plain_nats(base, TEXTS), rel=1e-4)

    training.begin(cfg, tmp_path / "init", new, splits, rows, "")
    layers = training.lora_layers(cfg)
    first_loss = {}
    for source, target, lora in (("init", "a", []), ("a", "c2", layers["attention"] + layers["mlp"])):
        facts = training.train_stage(cfg, tmp_path / source, tmp_path / target, new, ids, bool(lora), lora,
                                     (3e-2, 3e-3, 1e-2), rows * 2, len(rows), rows, "", lambda **values: None)
        first_loss[source] = facts["losses"][0]["value"]
    plain = {stage: plain_nats(tmp_path / stage, TEXTS) for stage in ("init", "a", "c2")}
    for stage, nats in plain.items():
        assert own_nats(tmp_path / stage, new, TEXTS) == pytest.approx(nats, rel=1e-4)
    tokens = sum(len(task.ids_of(new, text)) for text in TEXTS)
    for stage, loss in first_loss.items():  # rows and matrices are parameters of their own there, with LoRA
        assert loss == pytest.approx(sum(plain[stage]) / tokens, rel=1e-4)
    assert sum(plain["c2"]) < sum(plain["init"]) - 1  # it learnt

    was, now = (AutoModelForCausalLM.from_pretrained(tmp_path / stage).state_dict() for stage in ("a", "c2"))
    changed = {parameter for parameter in was if not torch.equal(was[parameter], now[parameter])}
    linear = {f"{layer}.weight" for layer in models.linear_layers(models.load_decoder(str(base), "fp32"))}
    assert linear < changed and len(changed - linear) == 2  # and the two matrices
    assert now["lm_head.weight" if "lm_head.weight" in now else "embed_out.weight"].dtype == torch.float32


def test_a_new_entry_of_a_head_with_a_bias_has_the_mean_logit_of_its_pieces(tokenizer, tmp_path):
    base = save_decoder("Phi", tokenizer, tmp_path / "base")
    new, added = vocabulary.extend(tokenizer, TERMS)
    splits = vocabulary.spell(added, tokenizer.get_vocab())
    training.begin(knobs(base), tmp_path / "init", new, splits, [{"text": TEXTS[0]}], "")
    head = models.load_decoder(str(tmp_path / "init"), "fp32").get_output_embeddings()
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = head(hidden)
    for new_id, pieces in splits.items():
        assert torch.allclose(logits[:, new_id], logits[:, pieces].mean(1), atol=1e-4)


def test_lora_layers_of_llama_are_those_it_always_had(tiny_model_folder):
    found = training.lora_layers(knobs(tiny_model_folder))
    assert [name.split(".")[1] for name in found["attention"]] == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert [name.split(".")[1] for name in found["mlp"]] == ["gate_proj", "up_proj", "down_proj"]
    given = training.lora_layers(knobs(tiny_model_folder, attention="q_proj v_proj", mlp="mlp.up_proj"))
    assert given == {"attention": ["q_proj", "v_proj"], "mlp": ["mlp.up_proj"]}


def test_lora_layers_do_not_overlap_and_a_wrong_name_is_answered_with_those_there_are(tokenizer, tmp_path):
    folder = save_decoder("GPT-2", tokenizer, tmp_path)
    found = training.lora_layers(knobs(folder))
    assert found == {"attention": ["attn.c_attn", "attn.c_proj"], "mlp": ["mlp.c_fc", "mlp.c_proj"]}
    with pytest.raises(SystemExit) as told:
        training.lora_layers(knobs(folder, attention="q_proj c_attn"))
    said = str(told.value)
    assert "attention=q_proj;" in said and said.endswith("it has attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj")
    assert "\n" not in said


def test_a_text_starts_with_what_the_tokenizer_puts_there_else_with_eos(tokenizer, tmp_path, monkeypatch):
    with_bos = AutoTokenizer.from_pretrained(save_decoder("BOS", tokenizer, tmp_path), padding_side="left")
    assert task.start_ids(with_bos) == [1] and task.start_ids(vocabulary.extend(with_bos, TERMS)[0]) == [1]
    assert task.start_ids(tokenizer) == [tokenizer.eos_token_id] == [2]
    model, seen = models.load_decoder(str(tmp_path), "fp32"), []
    monkeypatch.setattr(model, "generate", lambda input_ids, **more: seen.append(input_ids) or input_ids)
    task.go_on(model, with_bos, [TEXTS[1]], 4)
    assert seen[0].tolist() == [with_bos(TEXTS[1]).input_ids]


def test_rows_are_written_in_the_order_of_the_ids_given(tiny_model_folder):
    model = models.load_decoder(str(tiny_model_folder), "fp32")
    embeddings.untie(model)
    before = model.get_input_embeddings().weight.detach().clone()
    rows = [torch.full((3, 64), float(side)) + torch.arange(3.0)[:, None] for side in (10, 20)]
    embeddings.write_rows(model, [700, 5, 90], rows)
    for side, layer in zip((10, 20), (model.get_input_embeddings(), model.get_output_embeddings())):
        assert layer.weight[[700, 5, 90], 0].tolist() == [side, side + 1, side + 2]
    learnt, _ = embeddings.train_rows(model, [90, 700, 5])
    assert learnt[0][:, 0].tolist() == [12, 10, 11]
    others = torch.ones(len(before), dtype=torch.bool)
    others[[700, 5, 90]] = False
    plain = models.load_decoder(str(tiny_model_folder), "fp32")
    embeddings.untie(plain)
    embeddings.write_rows(plain, [90, 700, 5], learnt)
    assert plain.get_input_embeddings().weight[[5, 90, 700], 0].tolist() == [11, 12, 10]
    assert torch.equal(plain.get_input_embeddings().weight[others], before[others])


@pytest.mark.parametrize("name", EACH)
def test_all_four_steps_take_it_and_store_what_the_plain_model_gives(name, repo, tokenizer, tmp_path):
    folder, slug = save_decoder(name, tokenizer, tmp_path / "base"), f"decoder-{name.replace(' ', '-')}"
    arguments = ["--model", str(folder), *test_pipeline3.own_arguments(repo)[2:], "compute=fp32", "n_known=1"]
    for step in ("01_data", "02_baseline", "03_train", "04_eval"):
        done = test_pipeline3.run(repo, step, "--run", slug, *arguments)
        assert done.returncode == 0, f"{step}: {done.stderr[-2000:]}"
    stored = repo / "runs" / slug / "task3_tokenizer"
    texts = [json.loads(line)["text"] for line in (stored / "uses.jsonl").read_text().splitlines()]
    items = json.loads((stored / "items.json").read_text())
    nats = {name: [item["nats"] for item in kinds["uses"]] for name, kinds in items.items()}
    assert nats["base"] == pytest.approx(plain_nats(folder, texts), rel=1e-4)
    assert nats["new init"] == pytest.approx(plain_nats(stored / "new" / "init", texts), rel=1e-4)
    assert nats["control c2"] == pytest.approx(plain_nats(stored / "control" / "c2", texts), rel=1e-4)
    elsewhere = test_pipeline3.nats_elsewhere(stored / "new" / "c2", stored / "uses.jsonl")
    assert nats["new c2"] == pytest.approx(elsewhere, rel=1e-4)


def test_a_wrong_name_of_a_layer_is_one_line_before_training(repo, tokenizer, tmp_path):
    folder = save_decoder("GPT-NeoX", tokenizer, tmp_path)
    arguments = ["--model", str(folder), *test_pipeline3.own_arguments(repo)[2:], "attention=q_proj"]
    done = test_pipeline3.run(repo, "01_data", "--run", "names3", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    done = test_pipeline3.run(repo, "03_train", "--run", "names3", *arguments)
    one_line(done, "attention=q_proj", "attention.query_key_value attention.dense")
    assert not (repo / "runs" / "names3" / "task3_tokenizer" / "new").exists()
