"""Task 2's scripts as a user runs them on own pairs: all steps, two processes, ablations, plain reload."""

import json
import random
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest

from pipeline import results
from tests.conftest import environment, one_line, result_rows, step

TASK = "task2_encoder"
run, rows_of = partial(step, task=TASK), partial(result_rows, task=TASK)
VERBS = ["sort", "open", "close", "count", "print", "merge", "split", "parse", "draw", "send", "load",
         "store"]
THINGS = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin"]
KNOBS = ["--set", "n_pool=24", "n_more=0", "n_dev=24", "batch_size=8", "compute=fp32"]
STEPS = ("01_data", "02_baseline", "03_train", "04_eval")


def own_arguments(repo, model) -> list[str]:
    """Arguments for 120 pairs and a tiny encoder; every tenth anchor is there twice, with another
    positive."""
    rng, pairs = random.Random(0), []
    for i in range(120):
        verb, thing = VERBS[i % 12], THINGS[i // 12]
        positive = f"{thing if i % 2 else 'it'} {rng.random()} then {VERBS.index(verb)} {rng.random()}"
        pairs.append({"anchor": f"{verb} every {thing}" if i % 10 else f"{verb} many things",
                      "positive": positive})
    (repo / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return ["--model", str(model), "--data", str(repo / "pairs.jsonl"), *KNOBS]


@pytest.fixture(scope="module")
def own(repo, tiny_encoder_folder):
    return own_arguments(repo, tiny_encoder_folder)


def run_all(repo, name, arguments, steps=STEPS):
    said = {}
    for script in steps:
        done = run(repo, script, "--run", name, *arguments)
        assert done.returncode == 0, f"{script}: {done.stderr[-2000:]}"
        said[script] = done.stdout
    return said


@pytest.fixture(scope="module")
def whole(repo, own):
    said = run_all(repo, "whole2", [*own, "max_steps=12", "eval_every=3"])
    return repo / "runs" / "whole2" / TASK, said


def test_own_pairs_run_through_all_four_steps(repo, whole):
    rows = rows_of(repo, "whole2", "04_eval")
    pool = [row for row in rows if row["table"] == "pool"]
    assert {row["name"] for row in pool} == {"base", "tuned", "delta"}
    deltas = [row for row in rows if row["name"] == "delta"]
    assert all({"lo", "hi", "p", "n", "verdict", "label"} <= row.keys() for row in deltas)
    assert {row["name"] for row in rows if row["table"] == "systems"} == {
        "random", "BM25", "fp32 base", "NF4 base", "NF4 + adapter", "fp32 + adapter", "merged fp32",
        "RRF of BM25 and NF4 base", "RRF of BM25 and NF4 + adapter"}
    counted = {row["metric"]: row["value"] for row in rows_of(repo, "whole2", "01_data")
               if row["table"] == "pool"}
    assert counted["queries_with_several"] > 0
    trained = {row["metric"]: row["value"] for row in rows_of(repo, "whole2", "03_train")}
    assert trained["reload_difference"] == 0 and not (whole[0] / "checkpoints").exists()


def test_what_is_saved_opens_elsewhere_with_plain_libraries(repo, whole, tiny_encoder_folder, tmp_path):
    """In another folder and process, with no module of this repository: the MRR@10 that 04 stored."""
    code = """
import json, sys, torch
from peft import PeftModel
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer
base, saved, test = sys.argv[1:]
rows = [row for row in map(json.loads, open(test)) if row["pool"]]

def mrr(encode):
    queries, documents = (torch.as_tensor(encode([row[side] for row in rows]))
                          for side in ("anchor", "positive"))
    groups, reciprocal, asked = [row["group"] for row in rows], [], set()
    for i, row in enumerate(rows):
        if row["anchor"].lower() not in asked:
            asked.add(row["anchor"].lower())
            order = (documents @ queries[i]).argsort(descending=True)[:10].tolist()
            right = [place for place, j in enumerate(order, 1) if groups[j] == groups[i]]
            reciprocal.append(1 / right[0] if right else 0)
    return sum(reciprocal) / len(reciprocal)

def by_peft(texts):
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    mask = inputs.attention_mask[..., None]
    with torch.no_grad():
        pooled = (model(**inputs).last_hidden_state * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(pooled, dim=1)

plain = AutoModel.from_pretrained(base, dtype=torch.float32)
model = PeftModel.from_pretrained(plain, saved + "/adapter").eval()
tokenizer = AutoTokenizer.from_pretrained(saved + "/adapter")
encoders = [SentenceTransformer(f"{saved}/{name}", device="cpu") for name in ("adapter", "merged")]
print(mrr(by_peft))
for encoder in encoders:
    print(mrr(lambda texts: encoder.encode(texts, normalize_embeddings=True)))
assert not {"common", "pipeline", "sources", "task2_encoder"} & set(sys.modules)
"""
    for name in ("adapter", "merged"):
        shutil.copytree(whole[0] / name, tmp_path / name)
    # the adapter names its base by the last part of its path: the process starts where that lies
    arguments = [tiny_encoder_folder, tmp_path, whole[0] / "test.jsonl"]
    alone = {name: value for name, value in environment(repo).items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=tiny_encoder_folder.parent,
                          env=alone, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    stored = {row["name"]: row["value"] for row in rows_of(repo, "whole2", "04_eval")
              if (row["table"], row["metric"]) == ("systems", "mrr@10")}
    names = ("fp32 + adapter", "fp32 + adapter", "merged fp32")
    assert list(map(float, done.stdout.split())) == pytest.approx([stored[name] for name in names], abs=1e-6)


def copy_data(repo, run_name):
    """What 01 made for the whole run, as that of another one."""
    for place, name in (("results", "01_data.json"), ("runs", "train.jsonl"), ("runs", "dev.jsonl")):
        copy = repo / place / run_name / TASK / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repo / place / "whole2" / TASK / name, copy)
        if name.endswith(".json"):
            copy.write_text(results.sealed(json.loads(copy.read_text()) | {"run": run_name}))


@pytest.mark.all
def test_two_equal_trainings_leave_equal_bytes(repo, own, whole):
    """In processes that order sets differently: all files of adapter/ and merged/, settings included."""
    hashes = []
    for seed in ("1", "2"):
        copy_data(repo, f"again{seed}")
        command = [sys.executable, f"{TASK}/03_train.py", "--profile", "smoke", "--run", f"again{seed}", *own,
                   "max_steps=2", "eval_every=2"]
        hash_seed = environment(repo) | {"PYTHONHASHSEED": seed}
        done = subprocess.run(command, cwd=repo, env=hash_seed, check=False, capture_output=True, text=True,
                              timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        folder = repo / "runs" / f"again{seed}" / TASK
        hashes.append({str(file.relative_to(folder)): results.sha256(file)
                       for name in ("adapter", "merged") for file in (folder / name).rglob("*")
                       if file.is_file()})
    assert hashes[0] == hashes[1] and "adapter/adapter_config.json" in hashes[0]


@pytest.mark.all
def test_two_processes_train_what_one_does(repo, own, whole):
    """The same global batches, split between both, with the other's half as negatives.

    Halves without each other's negatives would lose log 2 = 0.7 of the loss; the norm would show gradients
    summed instead of averaged, which Adam hides.
    """
    copy_data(repo, "two2")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
               f"{TASK}/03_train.py", "--profile", "smoke", "--run", "two2", *own, "max_steps=12",
               "eval_every=3"]
    on_cpu = environment(repo) | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=repo, env=on_cpu, check=False, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = ({(row["metric"], row.get("step")): row["value"] for row in rows_of(repo, name, "03_train")}
                for name in ("whole2", "two2"))
    assert one.keys() == two.keys() and two["processes", None] == 2 and two["reload_difference", None] == 0
    for metric, length, most in (("loss", 12, 2e-4), ("eval_mrr@10", 5, 1e-6)):  # losses have 4 digits
        keys = [key for key in one if key[0] == metric]
        assert len(keys) == length
        assert [one[key] for key in keys] == pytest.approx([two[key] for key in keys], abs=most)
    norms = [[float(norm) for norm in re.findall(r"grad_norm=(\S+)", text)]
             for text in (whole[1]["03_train"], done.stdout)]
    assert len(norms[0]) == 12 and norms[0] == pytest.approx(norms[1], rel=1e-3)  # one process prints


@pytest.mark.all
def test_labels_say_what_ran_and_an_ablation_is_trained_once(repo, own):
    """With an fp32 base there is one base, and nothing is called NF4."""
    arguments = [*own, "max_steps=2", "eval_every=2", "precision=fp32", "only=shuffled pairs"]
    run_all(repo, "fp32", arguments, (*STEPS, "ablations"))
    names = {row["name"] for row in rows_of(repo, "fp32", "04_eval") if row["table"] == "systems"}
    assert {"fp32 base", "fp32 + adapter", "merged fp32"} <= names
    assert not any("NF4" in name for name in names)
    sizes = [row["metric"] for row in rows_of(repo, "fp32", "02_baseline") if row["table"] == "size"]
    assert sizes == ["parameters", "bytes_fp32"]

    rows = rows_of(repo, "fp32", "ablations")
    assert {row["name"] for row in rows if row["table"] == "ablation"} == {"as in 03", "shuffled pairs"}
    stored = repo / "runs" / "fp32" / TASK / "ablations" / "shuffled-pairs" / "row.json"
    written = stored.stat().st_mtime_ns
    run_all(repo, "fp32", arguments, ["ablations"])
    assert stored.stat().st_mtime_ns == written
    wrong = run(repo, "ablations", "--run", "fp32", *arguments[:-1], "only=rank 5")
    one_line(wrong, "no row 'rank 5'", "rank 4")
