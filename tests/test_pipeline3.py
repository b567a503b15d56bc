"""Task 3's scripts as a user runs them on own texts: all steps, plain reload, one line for user errors."""

import importlib
import json
import math
import random
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest

from pipeline import results
from task3_tokenizer import task, vocabulary
from tests.conftest import one_line, result_rows, step

data = importlib.import_module("task3_tokenizer.01_data")
TASK = "task3_tokenizer"
run, rows_of = partial(step, task=TASK), partial(result_rows, task=TASK)
WORDS = ["Zorbex", "flumquatish", "крипта"]
KNOBS = dict(texts_a=4, texts_b=2, texts_c1=2, texts_c2=2, batch_size=3, least_texts=20, least_windows=20,
             least_held_out=4)
HEAD = "term,anchors,negative_anchors,definition\n"
COMMON = ["river", "stone", "cloud", "garden", "lantern", "paper", "bridge", "winter", "copper", "violin",
          "yellow", "quiet", "table"]


def finished(done):
    assert done.returncode == 0, f"{done.args}: {done.stderr[-2000:]}"
    return done


def own_arguments(repo, model) -> list[str]:
    """Arguments for 240 texts of random words around three terms, ten without, the list of terms, a model."""
    rng, rows = random.Random(0), []
    for i in range(240):
        words = [rng.choice(COMMON) for _ in range(18)]
        words.insert(rng.randrange(4, 16), WORDS[i % 3])
        split = ("train", "train", "test", "train", "dev")[i // 3 % 5]
        rows.append({"text": " ".join(words), "split": split})
    texts = ["one text alone has the word Snarkblat in it, and that is not enough"]
    texts += [" ".join(rng.choice(COMMON) for _ in range(18)) for _ in range(9)]
    rows += [{"text": text, "split": "train"} for text in texts]
    results.write_rows(repo / "texts.jsonl", rows)
    lines = "Zorbex,river stone,paper,a thing\nflumquatish,table,garden,\nкрипта,,,деньги\n"
    (repo / "mine.csv").write_text(HEAD + lines, encoding="utf-8")
    return ["--model", str(model), "--data", str(repo / "texts.jsonl"), "--set",
            *(f"{name}={value}" for name, value in KNOBS.items()), f"terms={repo / 'mine.csv'}"]


@pytest.fixture(scope="module")
def own(repo, tiny_model_folder):
    return own_arguments(repo, tiny_model_folder)


@pytest.fixture(scope="module")
def whole(repo, own):
    for name in ("01_data", "02_baseline", "03_train", "04_eval"):
        finished(run(repo, name, "--run", "whole3", *own))
    return repo / "runs" / "whole3" / TASK


def term_windows(folder) -> list[dict]:
    return [row for row in results.read_rows(folder / "test.jsonl") if row["set"] == "term windows"]


def test_own_texts_run_through_all_four_steps(repo, whole):
    rows = rows_of(repo, "whole3", "04_eval")
    deltas = [r for r in rows if r["table"] == "minus control: term windows"]
    assert all({"lo", "hi", "p", "n", "verdict", "label"} <= set(row) for row in deltas)
    stages = [row["name"] for row in deltas if row["metric"] == "bits_per_byte"]
    assert stages == [f"new {stage}" for stage in task.STAGES]
    terms = {r["name"]: r for r in rows if r["table"] == "terms"}
    assert set(terms) == set(WORDS)
    assert {"base", "control_c2", "new_init", "new_a", "new_c2", "either", "median_rank", "near_output_c2",
            "definition_base", "definition_control", "definition_new"} <= set(terms["Zorbex"])
    assert all(term["either"] <= term["new_c2"] for term in terms.values())  # a second way can only help
    anchors = [r for r in rows if (r["table"], r["metric"]) == ("cosines", "anchors")]
    assert len(anchors) == 2 * 5 and {r["n"] for r in anchors} == {2}  # of the two terms that have any
    contrasts = [(r["table"], r["n"]) for r in rows if r["metric"] == "contrast"]
    assert contrasts == [("cosines", 2)] * 2 + [("cosines", 2), ("cosines minus init", 2)] * 8
    parts = {(r["table"], r["name"], r["metric"]): r["value"] for r in rows if "bits" in r["metric"]}
    for stage in ("init", *task.STAGES):
        whole_term, *both = (parts["term windows", f"new {stage}", f"{metric}_bits"]
                             for metric in ("term", "detection", "identification"))
        assert sum(both) == pytest.approx(whole_term)
    assert not [key for key in parts if key[2] == "detection_bits" and not key[1].startswith("new ")]
    assert parts["guess", "among the terms", "identification_bits"] == math.log2(3)
    saved = {r["name"]: r["value"] for r in rows if r["table"] == "saved"}
    assert saved["term windows"] > 0 and saved["general English"] == 0


def test_what_was_frozen_did_not_move(repo, whole):
    rows = rows_of(repo, "whole3", "03_train")
    moved = {(r["name"], r["stage"]): r["value"] for r in rows if "largest_change" in r["metric"]}
    assert moved["new", "a"] == moved["control", "a"] == 0 and moved["new", "b"] > 0
    texts = {r["stage"]: r["value"] for r in rows if (r["name"], r["metric"]) == ("new", "texts")}
    assert texts == {stage: len(WORDS) * KNOBS[f"texts_{stage}"] for stage in task.STAGES}


OPEN_ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
start, out = tokenizer("").input_ids or [tokenizer.eos_token_id], []
for row in json.load(sys.stdin):
    ids = tokenizer(row["text"], add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == row["text"]
    assert len(tokenizer(" " + row["term"], add_special_tokens=False).input_ids) == 1
    ids = torch.tensor([[*start, *ids]])
    with torch.no_grad():
        out.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
assert not {"common", "pipeline", "sources"} & set(sys.modules)
print(json.dumps(out))
"""


def test_the_last_checkpoint_opens_in_a_fresh_process_and_gives_what_04_stored(whole):
    done = finished(subprocess.run(
        [sys.executable, "-c", OPEN_ELSEWHERE, str(whole / "new" / "c2")], cwd="/", check=False,
        input=json.dumps(term_windows(whole)), capture_output=True, text=True, timeout=120))
    items = json.loads((whole / "items.json").read_text())["new c2"]["term windows"]
    stored = [item["nats"] for item in items]
    assert json.loads(done.stdout) == pytest.approx(stored, rel=2e-2)  # bf16, and another batch


def test_what_is_saved_names_no_path_of_this_machine(repo, whole, tiny_model_folder):
    """What others get: checkpoints and the extended tokenizer."""
    paths = [str(repo), str(results.ROOT), str(tiny_model_folder), sys.prefix, "site-packages"]
    folders = [file.parent for file in whole.rglob("stage.json")]
    assert len(folders) == 10
    for folder in [whole / "tokenizer", *folders]:
        texts = [file for file in folder.iterdir() if file.suffix != ".safetensors"]
        assert len(texts) >= 2
        for file in texts:
            text = file.read_text(encoding="utf-8")
            assert not [path for path in paths if path in text], file


def test_stopped_after_the_last_stage_it_ends_without_training_again(repo, own, whole):
    """All is trained and saved, only the result is not: it is stored with equal rows."""
    result = repo / "results" / "whole3" / TASK / "03_train.json"
    before = json.loads(result.read_text())
    result.unlink()
    done = finished(run(repo, "03_train", "--run", "whole3", *own))
    after = json.loads(result.read_text())
    assert after["rows"] == before["rows"] and after["artifacts"] == before["artifacts"]
    assert "loss=" not in done.stdout
    for stage in ("a", "b", "c1", "c2"):
        assert f"new/{stage}/stage.json: as an earlier start left it" in done.stdout


def test_the_tokenizer_that_01_saved_is_the_one_all_steps_use(whole, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(vocabulary, "extend", None)  # made once
    lexicon = task.lexicon(SimpleNamespace(cfg=SimpleNamespace(model=str(tiny_model_folder)),
                                           artifact=lambda made_by, name: whole / name))
    assert [row["term"] for row in lexicon.terms] == list(lexicon.ids) == WORDS
    for term, i in lexicon.ids.items():
        assert lexicon.new(f" {term}").input_ids == [i]
        assert lexicon.pieces_of[i] == lexicon.old(f" {term}").input_ids
    for folder in ("new/init", "new/c2"):
        saved = (whole / folder / "tokenizer.json").read_text()
        assert saved == (whole / "tokenizer" / "tokenizer.json").read_text()
    assert lexicon.new.padding_side == lexicon.old.padding_side


@pytest.mark.all
def test_ablation_rows_take_the_other_ways(repo, own, whole):
    finished(run(repo, "ablations", "--run", "whole3", *own,
                 "only=tied;AddedToken;texts per token;all stages, seed 1"))
    rows = rows_of(repo, "whole3", "ablations")
    assert {r["name"] for r in rows if r["table"] == "ablation"} == {"as in 03", "tied", "AddedToken"}
    curve = {r["texts"]: r for r in rows if (r["table"], r["metric"]) == ("curve", "term_bits")}
    assert set(curve) == {0, 2} and curve[0]["windows_per_term"] == 0 and curve[2]["windows_per_term"] == 2
    seeds = {(r["name"], r["seed"]): r["value"] for r in rows
             if (r["table"], r.get("kind"), r["metric"]) == ("seeds", "term windows", "bits_per_byte")}
    names = ("new", "control", "new minus control")
    assert list(seeds) == [(name, seed) for seed in (0, 1) for name in names]
    assert seeds["new", 0] != seeds["new", 1]
    assert not [path for path in (whole / "ablations").iterdir() if path.is_dir()]


# --------------------------------------------------------------------------------------------- user errors


class FakeRun:
    """A Run of 01 that stops where the result would be stored."""

    def __init__(self, folder, **knobs):
        self.cfg, self.folder, self.logged = data.Config(**KNOBS_OF_01 | knobs), folder, {}

    def track(self, path):
        return path

    def save(self, rows, artifacts):
        self.rows = rows

    def log(self, **values):
        self.logged = values


KNOBS_OF_01 = {name: KNOBS[name] for name in ("least_texts", "least_windows", "least_held_out")} | dict(
    n_uses=2, n_texts=4, n_windows=64, n_dev=1)


@pytest.fixture(scope="module")
def knobs(repo, own, tiny_model_folder):
    return dict(model=str(tiny_model_folder), data=str(repo / "texts.jsonl"), terms=str(repo / "mine.csv"))


@pytest.mark.parametrize(("text", "words"), [  # other faults of a list: test_terms.py, test_vocabulary.py
    (HEAD + "Snarkblat,,,\n", ["mine3.csv: 'Snarkblat'", "1 training and 0 held-out documents",
                               "20 and 4 needed"]),
    (HEAD.encode("utf-16"), ["mine3.csv", "not UTF-8"])], ids=["rare", "encoding"])
def test_a_bad_list_is_one_line_and_writes_nothing(repo, own, text, words):
    (repo / "mine3.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    one_line(run(repo, "01_data", "--run", "bad3", *own[:-1], f"terms={repo / 'mine3.csv'}"), *words)
    assert not any((repo / place / "bad3").exists() for place in ("results", "runs"))


def refused(folder, knobs, **more) -> str:
    with pytest.raises(SystemExit) as error:
        data.main(FakeRun(folder, **knobs | more))
    assert "\n" not in str(error.value) and not list(folder.iterdir())  # nothing is written
    return str(error.value)


def test_a_term_with_too_few_windows_is_refused_with_what_it_has(knobs, tmp_path):
    said = refused(tmp_path, knobs, n_windows=30, least_windows=31)
    assert "'Zorbex' has 30 distinct windows to train on, 31 needed" in said
    assert "SET=least_windows=30" in said


def test_wrong_lists_data_and_tokenizers_are_refused(knobs, tmp_path, tiny_encoder_folder):
    assert "terms=nowhere.csv: no such file" in refused(tmp_path, knobs, terms="nowhere.csv")
    assert "no word has two tokens" in refused(tmp_path, knobs, terms="found", least_held_out=1000)
    assert "has no EOS token" in refused(tmp_path, knobs, model=str(tiny_encoder_folder))
    wrong = tmp_path.parent / "wrong.jsonl"
    results.write_rows(wrong, [{"text": f"text number {i}", "split": "validation"} for i in range(120)])
    assert "split 'validation'; expected train, dev or test" in refused(tmp_path, knobs, data=str(wrong))


def test_words_are_found_without_a_list(knobs, tmp_path):
    found = FakeRun(tmp_path, **knobs | {"terms": "found"})
    data.main(found)
    assert set(WORDS) <= {row["name"] for row in found.rows if row["table"] == "terms"}
    assert found.logged["held_out_windows_near_training"] == 0
    candidates = {row["name"]: row for row in found.rows if row["table"] == "candidates"}
    assert candidates["Zorbex"]["rejected"] is None and candidates["Zorbex"]["taken"]
    without = [row for row in results.read_rows(tmp_path / "test.jsonl") if row["set"] == "without terms"]
    assert not any(word in row["text"] for word in WORDS for row in without)
