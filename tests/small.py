"""Runs of each task so small that a step is a second: models of two layers with vocabularies of a few hundred
entries, own data of a few dozen rows.
"""

import hashlib
import itertools
import json
import operator
import random
import re
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline import results
from tests import breakage, forked
from tests.decoders import write_rows

RUN = "small"
STEPS = ("01_data", "02_baseline", "03_train", "04_eval")
TASKS = ("task1_decoder", "task2_encoder", "task3_tokenizer")
MEASURED = re.compile(r"seconds|per_second|predicted|peak")  # times and memory, which no two runs share
TEMPLATE = ("{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
            "{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
COMMON = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin",
          "yellow", "quiet", "table"]
TERMS = ["Zorbex", "flumquatish"]
KNOBS_1 = ["instruction=", "max_steps=6", "eval_every=2", "batch_size=4", "n_benchmark=4", "n_general=2",
           "max_new_tokens=2", "n_attribution=4"]
KNOBS_2 = ["n_pool=24", "n_more=0", "n_dev=24", "batch_size=8", "compute=fp32", "max_steps=6", "eval_every=2"]
KNOBS_3 = ["texts_a=2", "texts_b=2", "texts_c1=2", "texts_c2=2", "batch_size=2", "least_texts=16",
           "least_windows=16", "least_held_out=4", "n_uses=2", "n_texts=4", "n_windows=32", "n_dev=1"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template, learnt from the words of the data below."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [" ".join(COMMON) + " Which number has the row counted from"],
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, bos_token="<|im_start|>",
                                   eos_token="<|im_end|>", unk_token="<|endoftext|>")


def decoder(folder: Path) -> Path:
    own = tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(own), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id, initializer_range=0.2)).save_pretrained(folder)
    own.save_pretrained(folder)
    return folder


def pairs(file: Path) -> Path:
    rng = random.Random(0)
    results.write_rows(file, [{"anchor": f"{COMMON[i % 13]} every {COMMON[i // 13]} {i}",
                               "positive": f"{COMMON[i // 13]} {rng.random()} then {i % 13} {rng.random()}"}
                              for i in range(120)])
    return file


def texts(file: Path) -> Path:
    rng, rows = random.Random(0), []
    for i in range(160):
        words = [rng.choice(COMMON) for _ in range(18)]
        if i < 140:
            words.insert(rng.randrange(4, 16), TERMS[i % 2])
        split = ("train", "train", "test", "train", "dev")[i // 2 % 5]
        rows.append({"text": " ".join(words), "split": split})
    results.write_rows(file, rows)
    return file


def arguments(root: Path, task: str, encoder: Path) -> list[str]:
    """Model, data and knobs of the small run of a task, made in the repository copy `root`."""
    if task == "task2_encoder":
        return ["--model", str(encoder), "--data", str(pairs(root / "pairs.jsonl")), "--set", *KNOBS_2]
    model = ["--model", str(decoder(root / "small"))]
    if task == "task1_decoder":
        return [*model, "--data", str(write_rows(root / "rows.jsonl", 60)), "--set", *KNOBS_1]
    (root / "terms.csv").write_text("term,anchors,negative_anchors,definition\n"
                                    + "".join(f"{term},,,a thing\n" for term in TERMS))
    return [*model, "--data", str(texts(root / "texts.jsonl")), "--set", *KNOBS_3,
            f"terms={root / 'terms.csv'}"]


@dataclass
class Outcome:
    """What an undisturbed step left, how long it took, and which operations on files it made."""

    left: dict
    seconds: float
    operations: list[str]


class Steps:
    """The small run of a task in the repository copy `root`, step by step, each from the state before it."""

    def __init__(self, root: Path, task: str, arguments: list[str], kept: Path):
        self.root, self.task, self.kept, self.outcomes = root, task, kept, {}
        self.arguments = ["--profile", "smoke", "--run", RUN, *arguments]
        self.places = {name: root / name / RUN / task for name in ("runs", "results")}

    def reach(self, step: str) -> Outcome:
        """The outcome of `step`; makes it and those before it the first time."""
        for name in STEPS[:STEPS.index(step) + 1]:
            if name not in self.outcomes:
                self.restore(name)
                log, started = self.kept / f"{name}.log", time.perf_counter()
                self.finish(name, partial(breakage.count_operations, str(log), str(self.root)))
                self.outcomes[name] = Outcome(self.left(name), time.perf_counter() - started,
                                              log.read_text().splitlines())
                for place, folder in self.places.items():
                    shutil.copytree(folder, self.kept / f"after {name}" / place)
        return self.outcomes[step]

    def restore(self, step: str) -> None:
        """The state before `step`, or at the "end"."""
        before = dict(zip([*STEPS[1:], "end"], STEPS)).get(step)
        for place, folder in self.places.items():
            shutil.rmtree(folder, ignore_errors=True)
            if before:
                shutil.copytree(self.kept / f"after {before}" / place, folder)

    def run(self, step: str, prepare=None) -> subprocess.CompletedProcess:
        return forked.run(self.root, f"{self.task}/{step}.py", self.arguments, 300, prepare)

    def start(self, step: str, out: str, prepare=None):
        return forked.start(self.root, f"{self.task}/{step}.py", self.arguments, out, prepare)

    def finish(self, step: str, prepare=None) -> None:
        done = self.run(step, prepare)
        assert done.returncode == 0, f"{self.task} {step}: {done.stderr[-1500:]}"

    def result(self, step: str) -> Path:
        return self.places["results"] / f"{step}.json"

    def left(self, step: str) -> dict:
        """What can be compared of what `step` left: its rows and every file, but for measured values."""
        result = json.loads(self.result(step).read_text())
        folder, found = self.places["runs"], {}
        for name, digest in result["artifacts"].items():
            assert results.sha256(folder / name) == digest, f"{name} is not what {step} stored"
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            if "tensorboard" in file.parts:  # a file for each start, named after its time
                continue
            content = b"measured" if file.name == "stage.json" else file.read_bytes()
            found[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()[:12]
        rows = [row for row in result["rows"] if not MEASURED.search(row.get("metric", ""))]
        names = sorted(file.name for file in self.places["results"].iterdir())
        return {"rows": rows, "config": result["config"], "files": found, "results": names}

    def check(self, step: str, what: str, same=operator.eq) -> None:
        """AssertionError with the first differences if `step` left something else than undisturbed. `same`
        compares two rows, two pairs of a file or knob with its hash or value, or two names of results.
        """
        for key, whole in self.outcomes[step].left.items():
            now = self.left(step)[key]
            pairs = itertools.zip_longest(*(sorted(part.items()) if isinstance(part, dict) else part
                                            for part in (now, whole)))
            differ = [pair for pair in pairs if not same(*pair)]
            assert not differ, f"{self.task} {step}, {what}: {key}, now and undisturbed: {differ[:3]}"
