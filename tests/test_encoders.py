"""Task 2 with tiny encoders of eight architectures: what is measured and trained is what the plain model
computes, what is trained is saved and resumed, and memory decides only how many rows are computed at once."""

import json
from dataclasses import replace
from importlib import import_module

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from common import models, training
from pipeline import results
from sources import hub, pretrained
from task2_encoder import batches, task

data, step = (import_module(f"task2_encoder.{name}") for name in ("01_data", "03_train"))
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
PAIRS = [{"anchor": f"{VERBS[i // 15]} every {THINGS[i % 15]}", "positive":
          f"{THINGS[i % 15] if i % 2 else 'it'} {7 * i} then {'again and ' * (i % 5)}{i // 15} {i * i}"}
         for i in range(120)]


def save_encoder(name, folder):
    """A tiny random checkpoint of that architecture with the embedded encoder's tokenizer."""
    kind, differences, pooling, prompts = ENCODERS[name]
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve("embedded-minilm"))
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
    """Knobs of 03 for a tiny encoder: four steps in fp32, unless changed."""
    small = dict(precision="fp32", compute="fp32", max_tokens=64, batch_size=8, max_steps=4, eval_every=2,
                 log_every=1, warmup_steps=1, lora_r=4, lora_alpha=8)
    return step.Config(model=str(folder), **small | changes)


def rows(n=120):
    return data.group([{"id": f"r{i:03}", "name": f"row {i}", "package": "own", **pair}
                       for i, pair in enumerate(PAIRS[:n])])


def train(cfg, folder, some=None, log=lambda **values: None):
    return step.train(cfg, some or rows(), rows(20), folder / "checkpoints", "", log)


def curve(history, *metrics):
    return [entry[metric] for entry in history for metric in metrics if metric in entry]


def randomised(cfg):
    """A model whose adapter changes something, in eval mode: at the start of training B is zero."""
    model = step.load_model(cfg, "qlora")
    for name, parameter in step.trained(model).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


SOME = task.retrieval(rows(6))


# --------------------------------------------------------------------------------------------- plain model

def plain(name, folder, texts, prompt):
    """Unit vectors by transformers alone: hidden states of prompt + text, pooled and normalised by hand."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    vectors = []
    for text in texts:
        ids = tokenizer(prompt + text, truncation=True, max_length=64, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = model(input_ids=ids).last_hidden_state[0]
        vectors.append(hidden[0] if ENCODERS[name][2] == "cls" else hidden.mean(0))
    return torch.nn.functional.normalize(torch.stack(vectors), dim=1)


@pytest.mark.parametrize("name", EACH)
def test_what_is_measured_and_trained_is_what_the_plain_model_computes(name, folders, tmp_path):
    folder, prompts, some = folders[name], ENCODERS[name][3], rows(8)
    cfg = config(folder, max_steps=1, scale=33.0)
    queries = plain(name, folder, [row["anchor"] for row in some], prompts.get("query", ""))
    documents = plain(name, folder, [row["positive"] for row in some], prompts.get("passage", ""))
    measured = task.embed(task.load_encoder(cfg), task.retrieval(some), 4)
    for kind, vectors in (("query", queries), ("document", documents)):
        assert torch.allclose(torch.stack(list(measured[kind].values())), vectors, atol=1e-4)
    assert (queries - queries[0]).abs().max() > 0.01  # texts do not all look the same to a random model

    scores, own = cfg.scale * queries @ documents.T, torch.arange(8)
    cross_entropy = torch.nn.functional.cross_entropy
    loss = (cross_entropy(scores, own) + cross_entropy(scores.T, own)) / 2
    assert curve(train(cfg, tmp_path, some)[2], "loss") == pytest.approx([loss.item()], abs=1e-3)


@pytest.mark.parametrize("name", EACH)
def test_every_architecture_is_trained_in_4_bits_and_saved(name, folders, tmp_path):
    cfg, prompts = config(folders[name], precision="nf4", max_steps=2), ENCODERS[name][3]
    model, facts, _ = train(cfg, tmp_path)
    kinds = {type(module.base_layer).__name__ for module in model.modules() if hasattr(module, "base_layer")}
    trained = step.trained(model)
    assert kinds == {"Linear4bit"} and {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert all("lora_" in name and "pooler" not in name for name in trained)
    linear = models.linear_layers(AutoModel.from_pretrained(folders[name]), skip=("pooler",))
    assert facts["trainable_parameters"] == sum(4 * sum(shape) for shape in linear.values())

    shown = step.save(model, cfg, tmp_path, SOME)
    assert shown["reload_difference"] == 0 < shown["reload_minus_base"]
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == sorted({layer.rsplit(".", 1)[-1] for layer in linear})
    expected = {"query": prompts.get("query", ""), "document": prompts.get("passage", "")}
    for part in ("adapter", "merged"):
        stored = json.loads((tmp_path / part / "config_sentence_transformers.json").read_text())
        assert stored["prompts"] == expected


def test_prompts_of_the_knobs_replace_the_model_s_own(folders):
    """The word own stands for query, and for document, else passage, else corpus; an empty text for none."""
    e5 = folders["BERT with prompts"]
    assert task.load_encoder(config(e5)).prompts == {"query": "query: ", "document": "passage: "}
    changed = task.load_encoder(config(e5, query_prompt="", document_prompt="text: "))
    assert changed.prompts == {"query": "", "document": "text: "}
    bge = "Represent this sentence for searching relevant passages: "
    model, text = task.load_encoder(config(folders["BERT"], query_prompt=bge)), PAIRS[0]["anchor"]
    vectors = task.embed(model, task.Retrieval({"q": text}, {"d": bge + text}, {}), 1)
    assert torch.equal(vectors["query"]["q"], vectors["document"]["d"])


def test_a_model_whose_default_prompt_was_for_passages_opens_again(folders, tmp_path):
    model = SentenceTransformer(str(folders["BERT with prompts"]), device="cpu")
    model.default_prompt_name = "passage"
    model.save_pretrained(str(tmp_path / "model"), create_model_card=False)
    loaded = task.load_encoder(config(tmp_path / "model"))
    loaded.save_pretrained(str(tmp_path / "again"), create_model_card=False)
    assert SentenceTransformer(str(tmp_path / "again"), device="cpu").prompts["document"] == "passage: "


# --------------------------------------------------------------------------------------- model and adapter

class Stop(Exception):
    """Raised by a test that has seen what it wants."""


@pytest.mark.parametrize(("precision", "compute", "bf16"), [
    ("nf4", "fp32", False), ("nf4", "bf16", True), ("bf16", "fp32", True), ("fp32", "bf16", False)])
def test_training_uses_the_format_of_the_knobs(precision, compute, bf16, folders, tmp_path, monkeypatch):
    """Over a 4-bit base the knob `compute` decides, over another its own format. Prompts arrive as well."""
    asked = {}

    def spy(**arguments):
        asked.update(arguments)
        raise Stop

    monkeypatch.setattr(step, "SentenceTransformerTrainingArguments", spy)
    cfg = config(folders["BERT with prompts"], precision=precision, compute=compute, learning_rate=3e-4)
    with pytest.raises(Stop):
        train(cfg, tmp_path)
    assert (asked["bf16"], asked["fp16"], asked["learning_rate"]) == (bf16, False, 3e-4)
    assert asked["prompts"] == {"anchor": "query: ", "positive": "passage: "}


def test_gradients_are_alive_and_unchanged_after_an_evaluation(folders):
    model = randomised(config(folders["BERT"], precision="nf4", compute="bf16"))

    def gradients():
        model.train().zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            one, other = (model(model.preprocess(list(texts.values())))["sentence_embedding"]
                          for texts in (SOME.queries, SOME.documents))
        step.cos_sim_fp32(one, other).trace().backward()
        return {name: parameter.grad.clone() for name, parameter in step.trained(model).items()}

    before = gradients()
    task.embed(model.eval(), SOME, 8)
    after = gradients()
    assert all(torch.equal(before[name], after[name]) and before[name].abs().max() > 0 for name in before)


def test_a_full_fine_tune_leaves_out_only_the_pooler(folders):
    model = step.load_model(config(folders["BERT"]), "full")
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == {
        name for name, _ in model.named_parameters() if "pooler" in name}


def test_models_that_cannot_be_adapted_are_refused(folders, tmp_path):
    cfg = config(folders["BERT"])
    with pytest.raises(SystemExit, match=r"q_proj.*dense, key, query, value"):
        step.load_model(replace(cfg, target_modules="q_proj,dense"), "qlora")
    with pytest.raises(SystemExit, match=r"max_tokens=129: .* reads at most 128 tokens"):
        task.load_encoder(replace(cfg, max_tokens=129))
    encoder = task.load_encoder(cfg)
    encoder.append(Dense(64, 32))
    encoder.save_pretrained(str(tmp_path / "dense"), create_model_card=False)
    with pytest.raises(SystemExit, match="its Dense module is not covered"):
        step.load_model(replace(cfg, model=str(tmp_path / "dense")), "qlora")


def test_a_regular_expression_for_the_layers_is_saved_as_it_is(folders, tmp_path):
    cfg = config(folders["BERT"], target_modules=r".*\.(query|value)")
    assert step.save(randomised(cfg), cfg, tmp_path, SOME)["reload_difference"] == 0
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["target_modules"] == cfg.target_modules


def test_an_adapter_that_does_not_reload_is_refused(folders, tmp_path):
    cfg = config(folders["BERT"], precision="nf4")
    with pytest.raises(SystemExit, match="reloads wrongly"):
        step.save(step.load_model(cfg, "qlora").eval(), cfg, tmp_path, SOME)  # B is zero: it changes nothing


@pytest.mark.parametrize("name", ["embedded-minilm", "owner/name"])
def test_what_is_saved_names_its_base_and_no_place_on_this_machine(name, folders, tmp_path, monkeypatch):
    commit = "c" * 40
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", None)  # saving asks no hub
    cfg = config(name, precision="nf4")
    if name == "owner/name":
        monkeypatch.setattr(pretrained, "resolve", lambda asked, choices: str(folders["BERT"]))
        monkeypatch.setattr(hub, "cached_revision", lambda asked: commit)
    model = randomised(cfg)
    step.save(model, cfg, tmp_path, SOME)
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == name
    assert adapter["revision"] == (commit if name == "owner/name" else None)
    cache = hub.cache_folder("owner/name", "model").parent
    places = [str(results.ROOT), "site-packages", str(folders["BERT"].parent), str(cache)]
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            text = file.read_text(encoding="utf-8")
            assert not [place for place in places if place in text], file
    assert (tmp_path / "adapter" / "tokenizer.json").exists()


# -------------------------------------------------------------------------------------------------- memory

def test_fewer_rows_at_once_have_the_same_loss_and_gradients(folders):
    model = randomised(config(folders["BERT with prompts"])).train()
    features = [model.preprocess([pair[side] for pair in PAIRS[:8]]) for side in task.SIDES]
    values, gradients = [], []
    for loss in (step.contrastive_loss(model, 20.0), step.contrastive_loss(model, 20.0, rows_at_once=4)):
        model.zero_grad()
        value = loss([dict(feature) for feature in features], None)
        value.backward()
        values.append(value.item())
        gradients.append({name: parameter.grad.clone() for name, parameter in step.trained(model).items()})
    assert values[0] == pytest.approx(values[1], abs=1e-4)
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0 and torch.allclose(gradient, gradients[1][name], atol=1e-4), name


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_fewer_rows_at_once_train_the_same(compute, folders, tmp_path):
    """The whole way through the Trainer, where autocast could lose the gradients of the second pass."""
    curves = []
    for rows_per_pass in (8, 3):
        cfg = config(folders["BERT"], precision="nf4", compute=compute, rows_per_pass=rows_per_pass)
        _, facts, history = train(cfg, tmp_path / str(rows_per_pass))
        assert facts["rows_per_pass"] == rows_per_pass
        curves.append(curve(history, "loss", "grad_norm"))
    assert len(curves[0]) == 8
    assert curves[1] == pytest.approx(curves[0], rel=1e-4 if compute == "fp32" else 0.03)


def test_as_many_rows_are_computed_at_once_as_fit(folders, monkeypatch):
    cfg = config(folders["BERT"])
    model, some = step.load_model(cfg, "qlora"), [{"anchor": "word " * 30, "positive": "word " * 60}]

    def chosen(batch=512, **changes):
        return batches.rows_at_once(model, replace(cfg, **changes), some, [(32, 62)], batch)

    count, total = chosen()
    resident = training.predict(model)["resident"]
    needed = total - resident
    assert count == 512 and needed > 512 * 60 * 2 * 20 * 64 * 4
    fewer, smaller = chosen(memory_gib=(resident + 0.4 * needed) / 2**30)
    assert fewer in (64, 128, 256) and smaller - resident < 0.4 * needed
    assert chosen(rows_per_pass=100)[0] == 100 and chosen(8, rows_per_pass=100)[0] == 8
    assert chosen(memory_gib=0.001)[0] == 1


# --------------------------------------------------------------------------------------------- interrupted

@pytest.fixture(scope="module")
def uninterrupted(folders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("training")
    cfg = config(folders["BERT"], max_steps=6)
    return cfg, folder, train(cfg, folder)


def same_weights(one, other):
    return all(torch.equal(weights, step.trained(other)[name]) for name, weights in step.trained(one).items())


def test_interrupted_training_resumes_to_the_same_weights(uninterrupted, tmp_path):
    """Stopped after step 5, whose predecessor has a checkpoint; the second call makes steps 5 and 6."""
    cfg, _, (model, facts, history) = uninterrupted
    seen = []

    def stops(**values):
        if values.get("step") == "5/6":
            raise Stop

    with pytest.raises(Stop):
        train(cfg, tmp_path, log=stops)
    again, resumed, same = train(cfg, tmp_path, log=lambda **values: seen.append(values.get("step")))
    assert [at for at in seen if at] == ["5/6", "6/6", "6/6"]
    metrics = ("loss", "eval_mrr@10", "learning_rate")
    assert curve(same, *metrics) == pytest.approx(curve(history, *metrics), abs=1e-6)
    assert len(curve(history, "eval_mrr@10")) == 4
    assert resumed["kept_step"] == facts["kept_step"] and same_weights(model, again)
    for name in ("training_seconds", "tokens_per_second"):
        assert facts[name] > 0 and resumed[name] is None


def test_complete_training_goes_on_to_its_result(uninterrupted):
    """The process died after the last checkpoint: the same call makes no step and has the same weights."""
    cfg, folder, (model, facts, history) = uninterrupted
    again, other, same = train(cfg, folder)
    metrics = ("loss", "eval_mrr@10")
    assert same_weights(model, again) and curve(same, *metrics) == curve(history, *metrics)
    steady = [name for name in facts if "bytes" not in name and "second" not in name]
    assert {name: facts[name] for name in steady} == {name: other[name] for name in steady}


def test_the_weights_of_the_best_evaluation_are_kept(folders, tmp_path, monkeypatch):
    """Step 0 does not count, so that a training that harms shows it; of equals the first is kept."""
    scores, kept = iter([0.9, 0.3, 0.5, 0.5, 0.4]), []
    monkeypatch.setattr(task, "mean_mrr", lambda items: next(scores))
    cfg = config(folders["BERT"], max_steps=4, eval_every=1)
    save = step.Trainer._save
    monkeypatch.setattr(step.Trainer, "_save", lambda self, *args, **more: (
        kept.append({name: p.detach().clone() for name, p in step.trained(self.model).items()}),
        save(self, *args, **more)))
    model, facts, _ = train(cfg, tmp_path)
    names = ("kept_step", "dev_mrr_before", "dev_mrr_kept", "dev_mrr_last")
    assert [facts[name] for name in names] == [2, 0.9, 0.5, 0.4]
    assert len(kept) == 4 and all(torch.equal(p, kept[1][name]) for name, p in step.trained(model).items())
