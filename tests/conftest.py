"""Shared fixtures: tiny random models with real tokenizers, and a copy of the code to write into."""

import os

# No test asks a hub. This stands before the imports that read it.
os.environ |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}

import contextlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import hypothesis
import pytest
import torch

from common import models
from pipeline import results, runner
from sources import pretrained
from tests import forked, small

# Cases of each generated test; `make faults` takes --hypothesis-profile=faults. The same every time.
hypothesis.settings.register_profile("some", max_examples=30, derandomize=True, database=None, deadline=None,
                                     suppress_health_check=list(hypothesis.HealthCheck))
hypothesis.settings.register_profile("faults", hypothesis.settings.get_profile("some"), max_examples=1000)
hypothesis.settings.load_profile("some")


SHARED = ("common", "pipeline", "sources")  # folders of what the tasks share


@pytest.fixture(autouse=True)
def earlier_steps():
    """Each test is a process that has read no earlier step: its number format is this machine's."""
    runner.UPSTREAM.clear()


@pytest.fixture(scope="session")
def record():
    """record(table, **columns) keeps a row for tests/tables.py, if `make faults` has asked for rows."""
    def one(table: str, **columns) -> None:
        if "FAULT_ROWS" in os.environ:
            with open(os.environ["FAULT_ROWS"], "a", encoding="utf-8") as file:
                row = json.dumps({"table": table, **columns})
                file.write(re.sub(r"(tfevents)[.\w-]+", r"\1", row) + "\n")  # their names have the machine's
    return one


@pytest.fixture(scope="session")
def tokenizer():
    return models.load_tokenizer("embedded-135m")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_encoder_folder(tmp_path_factory):
    """A random BERT of two layers and 64 dimensions with the embedded encoder's tokenizer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel
    folder = tmp_path_factory.mktemp("tiny_encoder")
    tokenizer = models.load_encoder("embedded-minilm", "fp32").tokenizer
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                        num_attention_heads=4, max_position_embeddings=128, initializer_range=0.2)
    BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert"), max_seq_length=128), Pooling(64), Normalize()]
    encoder = SentenceTransformer(modules=modules, device="cpu")
    encoder.save_pretrained(str(folder / "model"), create_model_card=False)
    return folder / "model"


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder):
    return models.load_decoder(str(tiny_model_folder), "fp32")


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    """A copy of the code that shares only the cached assets, so a test never touches the real results."""
    pretrained.resolve("embedded-135m")
    root = tmp_path_factory.mktemp("repo")
    for folder in (*SHARED, *(path.name for path in results.ROOT.glob("task*") if path.is_dir())):
        shutil.copytree(results.ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(results.ROOT / "ask.py", root)
    (root / "runs").mkdir()
    (root / "runs" / "assets").symlink_to(results.ROOT / "runs" / "assets")
    return root


@pytest.fixture(scope="session")
def quick(repo, tmp_path_factory):
    """A copy of the code for the small runs: one benchmark instead of four, which take 10 s to prepare."""
    root = tmp_path_factory.mktemp("quick") / "repo"
    shutil.copytree(repo, root, ignore=shutil.ignore_patterns("results", "runs", "__pycache__"))
    (root / "results").mkdir()
    (root / "runs").mkdir()
    (root / "runs" / "assets").symlink_to(results.ROOT / "runs" / "assets")
    harness = root / "task1_decoder" / "harness.py"
    text, n = re.subn(r"BENCHMARKS = \{.*?\}", 'BENCHMARKS = {"sciq/sciq.yaml": "sciq/none"}',
                      harness.read_text(), flags=re.DOTALL)
    assert n == 1
    harness.write_text(text)
    return root


@pytest.fixture(scope="session")
def steps(quick, tiny_encoder_folder, tmp_path_factory):
    """steps(task): its Steps, made once."""
    made = {}

    def of(task: str) -> small.Steps:
        if task not in made:
            kept = tmp_path_factory.mktemp(task)
            made[task] = small.Steps(quick, task, small.arguments(quick, task, tiny_encoder_folder), kept)
        return made[task]
    return of


def repository_files() -> list[Path]:
    """The files that git knows or would take; in a copy without git, all but those that runs and tools make.
    """
    listed = ""
    with contextlib.suppress(FileNotFoundError):  # no git on this machine
        listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
                                cwd=results.ROOT, capture_output=True, text=True, check=False).stdout
    names = [Path(name) for name in listed.split("\0") if name]
    names = names or [path.relative_to(results.ROOT) for path in results.ROOT.rglob("*")
                      if not re.search(r"/(\.|runs/|__pycache__/)", f"/{path.relative_to(results.ROOT)}")]
    return sorted(results.ROOT / name for name in names if (results.ROOT / name).is_file())


def copy_repository(root: Path, without: str = "") -> Path:
    """Copy its files, but for those of the folder `without`, to `root`."""
    for path in repository_files():
        name = path.relative_to(results.ROOT)
        if name.parts[0] != without:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / name)
    return root


def environment(root: Path) -> dict:
    return os.environ | {"PYTHONPATH": str(root)}


def step(root: Path, name: str, *args: str, task: str = "task1_decoder") -> subprocess.CompletedProcess:
    """Run a script of a task in `root` with the smoke profile."""
    return forked.run(root, f"{task}/{name}.py", ["--profile", "smoke", *args], timeout=300)


def result_rows(root: Path, run: str, name: str, task: str) -> list[dict]:
    return json.loads((root / "results" / run / task / f"{name}.json").read_text())["rows"]


def one_line(done: subprocess.CompletedProcess, *words: str) -> None:
    """A user error: exit code not 0, no traceback, a last line that names the things."""
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    for word in words:
        assert word in last, f"{word!r} not in {last!r}"
