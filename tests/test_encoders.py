"""Task 2 with other encoders than BERT: what is measured and trained is what the plain model computes, in
every step, and what is saved opens elsewhere."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from common import models, results
from task2_encoder import pairs, task, training
from tests.conftest import result_rows, step

SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=132, initializer_range=0.2, pad_token_id=0)
ENDS = dict(bos_token_id=101, eos_token_id=102)  # of the tokenizer; not the defaults of these architectures
MODERN = ENDS | dict(cls_token_id=101, sep_token_id=102, local_attention=16, global_attn_every_n_layers=2)
DISTIL = dict(dim=64, hidden_dim=96, n_layers=2, n_heads=4)
E5 = {"query": "query: ", "passage": "passage: "}
# name -> (architecture, what differs from SIZES, pooling or None without modules.json, own prompts)
ENCODERS = {
    "BERT": ("Bert", {}, "mean", {}),
    "BERT with prompts": ("Bert", {}, "mean", E5),
    "BERT bare": ("Bert", {}, None, {}),
    "BERT CLS": ("Bert", {}, "cls", {}),
    "XLM-R": ("XLMRoberta", ENDS, "mean", {}),
    "MPNet": ("MPNet", {}, "mean", {}),
    "DistilBERT": ("DistilBert", DISTIL, "mean", {}),
    "ModernBERT": ("ModernBert", MODERN, "cls", {}),
}
REPRESENTATIVES = ("BERT with prompts", "ModernBERT")  # make test takes these two, make test-all every one
EACH = [name if name in REPRESENTATIVES else pytest.param(name, marks=pytest.mark.all) for name in ENCODERS]
VERBS = ("sort", "open", "close", "count", "print", "merge", "split", "parse")
THINGS = ("river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin",
          "harbour", "meadow", "candle", "market", "window")
ROWS = [{"anchor": f"{VERBS[i // 15]} every {THINGS[i % 15]}", "positive":
         f"{THINGS[i % 15] if i % 2 else 'it'} {7 * i} then {'again and ' * (i % 5)}{i // 15} {i * i}"}
        for i in range(120)]


def save_encoder(name, folder):
    """A tiny random checkpoint of that architecture with the embedded encoder's tokenizer."""
    kind, differences, pooling, prompts = ENCODERS[name]
    tokenizer = AutoTokenizer.from_pretrained(models.resolve("embedded-minilm"))
    tokenizer.model_max_length = 128
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | dict(vocab_size=len(tokenizer)) | differences)
    inner = folder if pooling is None else folder / "inner"
    getattr(transformers, f"{kind}Model")(config).save_pretrained(inner)
    tokenizer.save_pretrained(inner)
    if pooling is None:
        return folder
    parts = [Transformer(str(inner), max_seq_length=128), Pooling(64, pooling), Normalize()]
    encoder = SentenceTransformer(modules=parts, prompts=prompts, device="cpu")
    encoder.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: save_encoder(name, tmp_path_factory.mktemp("encoder")) for name in ENCODERS}


def config(folder, **changes):
    """Knobs of 03 for the tiny encoder: four steps in fp32, unless changed."""
    small = dict(precision="fp32", compute="fp32", max_tokens=64, batch_size=8, max_steps=4, eval_every=2,
                 log_every=1, warmup_steps=1, lora_r=4, lora_alpha=8)
    cfg = import_module("task2_encoder.03_train").Config(model=str(folder), **small)
    return replace(cfg, **changes)


def rows(n=120):
    own = [{"id": f"r{i:03}", "name": f"row {i}", "package": "own", **row} for i, row in enumerate(ROWS[:n])]
    return pairs.group(own)


def plain(name, folder, texts, prompt):
    """Unit vectors by transformers alone: hidden states of prompt + text, pooled and normalised by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for text in texts:
        ids = tokenizer(prompt + text, truncation=True, max_length=64, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        found.append(hidden[0] if ENCODERS[name][2] == "cls" else hidden.mean(0))
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


@pytest.mark.parametrize("name", EACH)
def test_what_is_measured_and_trained_is_what_the_plain_model_computes(name, folders, tmp_path):
    folder, prompts = folders[name], ENCODERS[name][3]
    cfg, some = config(folder, max_steps=1, eval_every=1, scale=33.0), rows(8)
    model = task.load_encoder(cfg)
    queries = plain(name, folder, [r["anchor"] for r in some], prompts.get("query", ""))
    documents = plain(name, folder, [r["positive"] for r in some], prompts.get("passage", ""))
    for side, kind, vectors in (("anchor", "query", queries), ("positive", "document", documents)):
        measured = task.embed(model, {r["id"]: r[side] for r in some}, kind, 4)
        assert torch.allclose(torch.stack(list(measured.values())), vectors, atol=1e-4)
    assert (queries - queries[0]).abs().max() > 0.01  # texts do not all look the same to a random model

    scores, own = cfg.scale * queries @ documents.T, torch.arange(8)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
    history = training.train(cfg, some, rows(20), tmp_path / "checkpoints", "", lambda **values: None)[2]
    assert next(h["loss"] for h in history if "loss" in h) == pytest.approx(loss.item(), abs=1e-3)


def run_steps(repo, run, folder, *knobs, scripts=("01_data", "02_baseline", "03_train", "04_eval")):
    (repo / "encoder.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    small = ["n_pool=24", "n_more=0", "n_dev=24", "max_steps=2", "eval_every=2", *knobs]
    for script in scripts:
        done = step(repo, script, "--run", run, "--model", str(folder), "--data", str(repo / "encoder.jsonl"),
                    "--set", *small, task="task2_encoder")
        assert done.returncode == 0, f"{script}: {done.stderr[-3000:]}"


@pytest.mark.parametrize("name", EACH)
def test_all_steps_run(name, folders, repo):
    run, folder = f"encoder-{name.replace(' ', '-')}", folders[name]
    run_steps(repo, run, folder)
    trained, tested = (result_rows(repo, run, name, "task2_encoder") for name in ("03_train", "04_eval"))
    saved = repo / "runs" / run / "task2_encoder"
    linear = models.linear_layers(AutoModel.from_pretrained(folder), skip=("pooler",))
    adapter = json.loads((saved / "adapter" / "adapter_config.json").read_text())
    assert set(adapter["target_modules"]) == {layer.rsplit(".", 1)[-1] for layer in linear}
    assert adapter["base_model_name_or_path"] == str(folder)
    facts = {r["metric"]: r["value"] for r in trained if r["table"] == "training"}
    assert facts["trainable_parameters"] == sum(16 * sum(shape) for shape in linear.values())
    assert facts["reload_difference"] == 0
    assert {r["model"] for r in tested if r["table"] == "headline"} == {"base", "tuned", "delta"}
    systems = {r["model"] for r in tested if r["table"] == "systems"}
    assert {"NF4 base", "NF4 + adapter", "fp32 base", "fp32 + adapter", "merged fp32"} <= systems
    prompts = ENCODERS[name][3]
    for part in ("adapter", "merged"):
        stored = json.loads((saved / part / "config_sentence_transformers.json").read_text())
        own = {"query": prompts.get("query", ""), "document": prompts.get("passage", "")}
        assert stored["prompts"] == own


def test_prompts_of_the_knobs_replace_the_model_s_own(folders):
    """The word own stands for query, and for document, else passage, else corpus; an empty text for none."""
    e5 = folders["BERT with prompts"]
    assert task.load_encoder(config(e5)).prompts == {"query": "query: ", "document": "passage: "}
    changed = task.load_encoder(config(e5, query_prompt="", document_prompt="text: "))
    assert changed.prompts == {"query": "", "document": "text: "}
    bge = "Represent this sentence for searching relevant passages: "
    model = task.load_encoder(config(folders["BERT"], query_prompt=bge))
    text = {"a": ROWS[0]["anchor"]}
    by_hand = task.embed(model, {"a": bge + text["a"]}, "document", 1)
    assert torch.equal(task.embed(model, text, "query", 1)["a"], by_hand["a"])


def test_a_model_whose_default_prompt_was_for_passages_opens_again(folders, tmp_path):
    model = SentenceTransformer(str(folders["BERT with prompts"]), device="cpu")
    model.default_prompt_name = "passage"
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    loaded = task.load_encoder(config(tmp_path / "model"))
    loaded.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    assert SentenceTransformer(str(tmp_path / "again"), device="cpu").prompts["document"] == "passage: "


# ------------------------------------------------------------------------------------------ precision


class Stop(Exception):
    """Raised by a spy once it has seen what it wants."""


@pytest.mark.parametrize(
    ("precision", "compute", "bf16"),
    [("nf4", "fp32", False), ("nf4", "bf16", True), ("bf16", "fp32", True), ("fp32", "bf16", False)],
)
def test_training_uses_the_format_of_the_knobs(precision, compute, bf16, folders, tmp_path, monkeypatch):
    """Over a 4-bit base the knob `compute` decides, over another its own format. Prompts arrive as well."""
    asked = {}

    def spy(**arguments):
        asked.update(arguments)
        raise Stop

    monkeypatch.setattr(training, "SentenceTransformerTrainingArguments", spy)
    cfg = config(folders["BERT with prompts"], precision=precision, compute=compute, learning_rate=3e-4)
    with pytest.raises(Stop):
        training.train(cfg, rows(20), rows(20), tmp_path / "checkpoints", "", lambda **values: None)
    assert (asked["bf16"], asked["fp16"]) == (bf16, False)
    assert asked["prompts"] == {"anchor": "query: ", "positive": "passage: "}
    assert asked["learning_rate"] == 3e-4


def test_labels_say_what_ran(folders, repo):
    """With an fp32 base there is one base, and nothing is called NF4."""
    folder, knobs = folders["BERT with prompts"], ["precision=fp32", "only=shuffled pairs"]
    run_steps(repo, "fp32", folder, *knobs)
    run_steps(repo, "fp32", folder, *knobs, scripts=["ablations"])
    tested = result_rows(repo, "fp32", "04_eval", "task2_encoder")
    names = {r["model"] for r in tested if r["table"] == "systems"}
    assert {"fp32 base", "fp32 + adapter", "merged fp32"} <= names
    assert not any("NF4" in name for name in names)
    rows = result_rows(repo, "fp32", "02_baseline", "task2_encoder")
    assert [r["metric"] for r in rows if r["table"] == "size"] == ["parameters", "bytes_fp32"]


# ------------------------------------------------------------------------------------------ what is saved


def randomised(cfg):
    model = training.prepare(cfg, "qlora")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model.eval()


@pytest.mark.parametrize("name", ["embedded-minilm", "owner/name"])
def test_what_is_saved_names_its_base_and_no_place_on_this_machine(name, folders, tmp_path, monkeypatch):
    commit = "c" * 40
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", None)  # saving asks no hub
    cfg = config(name, precision="nf4", compute="fp32")
    if name == "owner/name":
        monkeypatch.setattr(models, "resolve", lambda asked, choices: str(folders["BERT"]))
        monkeypatch.setattr(models.hub, "cached_revision", lambda asked: commit)
    training.save(randomised(cfg), cfg, tmp_path, [row["positive"] for row in ROWS[:4]])
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == name
    assert adapter["revision"] == (commit if name == "owner/name" else None)
    cache = models.hub.cache_folder("owner/name", "model").parent
    places = [str(results.ROOT), "site-packages", str(folders["BERT"].parent), str(cache)]
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert not [place for place in places if place in text], file
    assert (tmp_path / "adapter" / "tokenizer.json").exists()


def test_the_adapter_opens_elsewhere_with_plain_peft(folders, tmp_path):
    """In another folder and process, without this repository, given the base: the same embeddings."""
    cfg = config(folders["BERT"], precision="nf4", compute="fp32")
    texts = [row["positive"] for row in ROWS[:6]]
    training.save(randomised(cfg), cfg, tmp_path, texts)
    shutil.move(tmp_path / "adapter", tmp_path / "travelled")
    code = """
import sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer
base, adapter, out, *texts = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), adapter).eval()
tokenizer = AutoTokenizer.from_pretrained(adapter)
inputs = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
mask = inputs.attention_mask[..., None]
with torch.no_grad():
    pooled = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
save_file({"vectors": torch.nn.functional.normalize(pooled, dim=1)}, out)
assert not {"common", "task2_encoder"} & set(sys.modules)
"""
    arguments = [folders["BERT"], tmp_path / "travelled", tmp_path / "out.safetensors", *texts]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd="/", env=alone,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ours = task.embed(training.with_peft(tmp_path / "travelled", cfg), dict(enumerate(texts)), "document", 6)
    theirs = load_file(tmp_path / "out.safetensors")["vectors"]
    assert torch.allclose(torch.stack(list(ours.values())), theirs, atol=1e-5)
    base = task.embed(task.load_encoder(cfg, "fp32"), dict(enumerate(texts)), "document", 6)
    assert (torch.stack(list(base.values())) - theirs).abs().max() > 0.01


# ------------------------------------------------------------------------------------------ memory


def test_fewer_rows_at_once_have_the_same_loss_and_gradients(folders):
    model = randomised(config(folders["BERT with prompts"])).train()
    features = [model.preprocess([row[side] for row in ROWS[:8]]) for side in ("anchor", "positive")]
    options = dict(similarity_fct=training.cos_sim_fp32, **training.SYMMETRIC)
    found = []
    for loss in (training.MultipleNegativesRankingLoss(model, **options),
                 training.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4, **options)):
        model.zero_grad()
        value = loss([dict(feature) for feature in features], None)
        value.backward()
        trained = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append((value.item(), trained))
    (whole, gradients), (parts, others) = found
    assert parts == pytest.approx(whole, abs=1e-4)
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0 and torch.allclose(gradient, others[name], atol=1e-4), name


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_fewer_rows_at_once_train_the_same(compute, folders, tmp_path):
    """The whole way through the Trainer, where autocast could lose the gradients of the second pass."""
    curves, facts = [], []
    for rows_per_pass in (8, 3):
        cfg = config(folders["BERT"], precision="nf4", compute=compute, rows_per_pass=rows_per_pass)
        folder = tmp_path / str(rows_per_pass)
        _, trained, history = training.train(cfg, rows(), rows(20), folder, "", lambda **values: None)
        facts.append(trained)
        curves.append([h[m] for h in history for m in ("loss", "grad_norm") if m in h])
    assert [f["rows_per_pass"] for f in facts] == [8, 3]
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], rel=1e-4 if compute == "fp32" else 0.03)


def test_as_many_rows_are_computed_at_once_as_fit(folders):
    cfg, lines = config(folders["BERT"]), []
    model, longest = training.prepare(cfg, "qlora"), {"query": "word " * 30, "document": "word " * 60}
    model.eval()

    def chosen(batch=512, **changes):
        knobs = replace(cfg, **changes)
        return training.plan(model, knobs, longest, batch, lambda **values: lines.append(values))
    rows, predicted = chosen()
    needed = predicted["total"] - predicted["resident"]
    assert rows == 512 and needed > predicted["activations"] > 512 * 60 * 2 * 20 * 64 * 4
    resident = predicted["resident"]
    fewer, smaller = chosen(memory_gib=(resident + 0.5 * needed) / 2**30)
    assert fewer in (128, 256) and smaller["activations"] < 0.5 * predicted["activations"]
    assert lines[-1]["rows_per_pass"] == fewer
    told = lines[-1]
    assert told["whole_batch_GiB"] > told["resident_GiB"] + told["free_GiB"] > told["predicted_GiB"]
    assert chosen(rows_per_pass=100)[0] == 100 and chosen(8, rows_per_pass=100)[0] == 8
    with pytest.raises(SystemExit, match=r"one row at once needs .* GiB"):
        chosen(memory_gib=0.001)


# ------------------------------------------------------------------------------------------ killed at the end


def test_training_that_was_complete_goes_on_to_its_result(folders, tmp_path):
    """The process died after the last checkpoint: the same call makes no step and has the same weights."""
    cfg = config(folders["BERT"])
    first, facts, history = training.train(cfg, rows(), rows(20), tmp_path, "", lambda **values: None)
    again, other, same = training.train(cfg, rows(), rows(20), tmp_path, "", lambda **values: None)
    assert same == history
    for name, weights in training.trained_state(first).items():
        assert torch.equal(weights, training.trained_state(again)[name])
    timed = {"training_seconds", "tokens_per_second"}
    assert all(facts[name] > 0 and other[name] is None for name in timed)
    steady = [name for name in facts if name not in timed and "bytes" not in name]
    assert [facts[name] for name in steady] == [other[name] for name in steady]


def test_checkpoints_that_were_being_removed_are_not_resumed(tmp_path, monkeypatch):
    """Killed meanwhile, the folder may hold a state without weights; without its identity it is not used."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}\n")
    assert training.trainer_common.open_checkpoints(tmp_path, ["same"])[0] is None
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}\n")

    def killed(folder):
        raise Stop

    monkeypatch.setattr(training.trainer_common, "shutil", SimpleNamespace(rmtree=killed))
    with pytest.raises(Stop):
        training.trainer_common.remove(tmp_path)
    monkeypatch.undo()
    assert training.trainer_common.open_checkpoints(tmp_path, ["same"])[0] is None
