"""Task 3's scripts as a user runs them on own texts: all steps, resume after a kill, plain reload, one line for every user error."""

import json
import random
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from tests.conftest import environment, one_line, result_rows, step

TASK = "task3_tokenizer"
run, rows_of = partial(step, task=TASK), partial(result_rows, task=TASK)
WORDS = ["Zorbex", "flumquatish", "крипта"]
TRAIN = ["--set", "texts_a=4", "texts_b=2", "texts_c1=2", "texts_c2=2", "batch_size=3", "least_texts=20", "least_held_out=4", "n_known=2"]
HEAD = "term,anchors,negative_anchors,definition\n"


@pytest.fixture(scope="module")
def own(repo, tiny_model_folder):
    """Arguments for 240 texts of random words around three terms and ten without, a list of these terms, and a tiny model."""
    rng, rows = random.Random(0), []
    common = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin", "yellow", "quiet", "table"]
    for i in range(240):
        words = [rng.choice(common) for _ in range(18)]
        words.insert(rng.randrange(4, 16), WORDS[i % 3])
        rows.append({"text": " ".join(words), "split": ("train", "train", "test", "train", "dev")[i // 3 % 5]})
    rows.append({"text": "one text alone has the word Snarkblat in it, and that is not enough", "split": "train"})
    rows += [{"text": " ".join(rng.choice(common) for _ in range(18)), "split": "train"} for _ in range(9)]
    (repo / "texts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (repo / "mine.csv").write_text(HEAD + "Zorbex,river stone,paper,a thing\nflumquatish,,,\nкрипта,,,деньги\n")
    return ["--model", str(tiny_model_folder), "--data", str(repo / "texts.jsonl"), *TRAIN, f"terms={repo / 'mine.csv'}"]


@pytest.fixture(scope="module")
def whole(repo, own):
    for name in ("01_data", "02_baseline", "03_train", "04_eval"):
        assert (done := run(repo, name, "--run", "whole3", *own)).returncode == 0, f"{name}: {done.stderr[-2000:]}"
    return repo / "runs" / "whole3" / TASK


def test_own_texts_run_through_all_four_steps(repo, whole):
    rows = rows_of(repo, "whole3", "04_eval")
    assert {r["model"] for r in rows if r["table"] == "headline"} == {"base", "tuned", "delta"}
    assert all({"lo", "hi", "p", "n"} <= set(r) for r in rows if r["model"] == "delta")
    assert {r["model"] for r in rows if r["table"] == "cards"} == set(WORDS)
    frozen = {(r["model"], r["stage"]): r["value"] for r in rows_of(repo, "whole3", "03_train") if r["metric"] == "output_rows_identical"}
    assert {r["stage"] for r in rows if r["table"] == "leak"} == {"init", "a", "c2"}
    assert frozen["new", "a"] and frozen["control", "a"] and not frozen["new", "b"]


def test_the_windows_without_terms_have_none(whole):
    texts = [json.loads(line)["text"] for line in (whole / "plain.jsonl").read_text().splitlines()]
    assert len(texts) == 5 and not any(word in text for word in WORDS for text in texts)  # as many as the profile asks for, out of ten


def test_the_last_checkpoint_opens_in_a_fresh_process_and_gives_what_04_stored(repo, whole):
    """Plain transformers, no module of this repository: a term is one id, and its likelihood is the stored one."""
    code = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
out = []
for row in map(json.loads, open(sys.argv[2], encoding="utf-8")):
    ids = tokenizer(row["text"], add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == row["text"] and len(tokenizer(" " + row["term"], add_special_tokens=False).input_ids) == 1
    ids = torch.tensor([[tokenizer.eos_token_id, *ids]])
    with torch.no_grad():
        out.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
print(json.dumps(out))
"""
    done = subprocess.run([sys.executable, "-c", code, str(whole / "new" / "c2"), str(whole / "uses.jsonl")], cwd="/", capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    stored = [i["nats"] for i in json.loads((whole / "items.json").read_text())["new c2"]["uses"]]
    assert json.loads(done.stdout) == pytest.approx(stored, rel=2e-2)  # bf16, and another batch


def test_killed_and_resumed_training_equals_uninterrupted(repo, own, whole):
    folder = repo / "runs" / "killed3" / TASK
    assert run(repo, "01_data", "--run", "killed3", *own).returncode == 0
    child = subprocess.Popen([sys.executable, f"{TASK}/03_train.py", "--profile", "smoke", "--run", "killed3", *own], cwd=repo,
                             env=environment(repo), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while not (folder / "new" / "b" / "stage.json").exists():
        assert child.poll() is None and time.time() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (folder / "control" / "c2" / "stage.json").exists()
    (folder / "new" / "a" / "stage.json").touch()
    written = (folder / "new" / "a" / "stage.json").stat().st_mtime_ns
    assert (done := run(repo, "03_train", "--run", "killed3", *own)).returncode == 0, done.stderr
    assert (folder / "new" / "a" / "stage.json").stat().st_mtime_ns == written  # it went on, and did not start again
    one, other = ([(r["model"], r["stage"], r["step"], r["value"]) for r in rows_of(repo, name, "03_train") if r["table"] == "curve"]
                  for name in ("whole3", "killed3"))
    assert one == other and len(one) == 2 * (4 + 2 + 2 + 2)


def test_ablation_rows_take_the_other_ways(repo, own, whole):
    done = run(repo, "ablations", "--run", "whole3", *own, "seeds=2",
               "only=tied;AddedToken;text without terms mixed in;texts per token;all stages, seed 1;all stages, seed 2")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = rows_of(repo, "whole3", "ablations")
    assert {r["model"] for r in rows if r["table"] == "ablation"} == {"as in 03", "tied", "AddedToken", "text without terms mixed in"}
    assert {r["texts"] for r in rows if r["table"] == "texts"} == {0, 2}
    seeds = {(r["model"], r["seed"]): r["value"] for r in rows if r["table"] == "seeds" and r["kind"] == "uses"}
    assert len(seeds) == 9 and len({value for (model, _), value in seeds.items() if model == "new"}) == 3


@pytest.mark.parametrize(("text", "words"), [  # what else may be wrong with a list: tests/test_terms.py, tests/test_vocabulary.py
    (HEAD + "Snarkblat,,,\n", ["mine3.csv: 'Snarkblat'", "1 training and 0 held-out documents", "20 and 4 needed"]),
    (HEAD.encode("utf-16"), ["mine3.csv", "not UTF-8"])], ids=["rare", "encoding"])
def test_a_bad_list_is_one_line_and_writes_nothing(repo, own, text, words):
    (repo / "mine3.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    one_line(run(repo, "01_data", "--run", "bad3", *own[:-1], f"terms={repo / 'mine3.csv'}"), *words)
    assert not any((repo / place / "bad3").exists() for place in ("results", "runs"))


def test_words_are_found_without_a_list(repo, own):
    assert (done := run(repo, "01_data", "--run", "found3", *own[:-1], "terms=found")).returncode == 0, done.stderr[-2000:]
    found = {r["model"] for r in rows_of(repo, "found3", "01_data") if r["table"] == "terms"}
    assert set(WORDS) <= found


def test_a_wrong_list_and_a_wrong_tokenizer_are_one_line(repo, own, tiny_encoder_folder):
    one_line(run(repo, "01_data", "--run", "no3", *own[:-1], "terms=nowhere.csv"), "terms=nowhere.csv", "no such file", "terms=ru")
    one_line(run(repo, "01_data", "--run", "no3", *own[2:], "--model", str(tiny_encoder_folder)), "WordPiece", "byte-level BPE")
