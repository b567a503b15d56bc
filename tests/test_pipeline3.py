"""Task 3's scripts as a user runs them on own texts: all steps, resume after a kill, plain reload, one line for every user error."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.normalizers import Replace
from transformers import PreTrainedTokenizerFast

from common import results
from task3_tokenizer import task, vocabulary
from tests.conftest import environment, one_line, result_rows, step

TASK = "task3_tokenizer"
run, rows_of = partial(step, task=TASK), partial(result_rows, task=TASK)
WORDS = ["Zorbex", "flumquatish", "крипта"]
TRAIN = ["--set", "texts_a=4", "texts_b=2", "texts_c1=2", "texts_c2=2", "batch_size=3", "n_known=2",
         "least_texts=20", "least_windows=20", "least_held_out=4"]
HEAD = "term,anchors,negative_anchors,definition\n"


def own_arguments(repo, model="") -> list[str]:
    """Arguments for 240 texts of random words around three terms, ten without, the list of terms, a model."""
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
    return ["--model", str(model), "--data", str(repo / "texts.jsonl"), *TRAIN, f"terms={repo / 'mine.csv'}"]


@pytest.fixture(scope="module")
def own(repo, tiny_model_folder):
    return own_arguments(repo, tiny_model_folder)


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


OPEN_ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1], attn_implementation="eager").eval()
start, out = tokenizer("").input_ids or [tokenizer.eos_token_id], []
for row in map(json.loads, open(sys.argv[2], encoding="utf-8")):
    ids = tokenizer(row["text"], add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == row["text"] and len(tokenizer(" " + row["term"], add_special_tokens=False).input_ids) == 1
    ids = torch.tensor([[*start, *ids]])
    with torch.no_grad():
        out.append(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
assert "common" not in sys.modules
print(json.dumps(out))
"""


def nats_elsewhere(folder, uses) -> list[float]:
    """Nats of the texts in `uses` by plain transformers in a fresh process, where a term is one id."""
    done = subprocess.run([sys.executable, "-c", OPEN_ELSEWHERE, str(folder), str(uses)], cwd="/",
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_the_last_checkpoint_opens_in_a_fresh_process_and_gives_what_04_stored(whole):
    stored = [i["nats"] for i in json.loads((whole / "items.json").read_text())["new c2"]["uses"]]
    found = nats_elsewhere(whole / "new" / "c2", whole / "uses.jsonl")
    assert found == pytest.approx(stored, rel=2e-2)  # bf16, and another batch


def test_what_is_saved_names_no_path_of_this_machine(repo, whole, tiny_model_folder):
    """What others get: checkpoints and the extended tokenizer."""
    paths = [str(repo), str(results.ROOT), str(tiny_model_folder), sys.prefix, "site-packages"]
    folders = [file.parent for file in whole.rglob("stage.json") if (file.parent / "config.json").exists()]
    assert len(folders) == 10
    for folder in [whole / "tokenizer", *folders]:
        texts = [file for file in folder.iterdir() if file.suffix != ".safetensors"]
        assert len(texts) >= 2
        for file in texts:
            text = file.read_text(encoding="utf-8")
            assert not [path for path in paths if path in text], file


def test_killed_after_the_last_step_it_ends_without_training_again(repo, own, whole):
    """All is trained and saved, only the result is not: stored again with equal rows."""
    result = repo / "results" / "whole3" / TASK / "03_train.json"
    before = json.loads(result.read_text())
    result.unlink()
    done = run(repo, "03_train", "--run", "whole3", *own)
    assert done.returncode == 0, done.stderr
    after = json.loads(result.read_text())
    assert after["rows"] == before["rows"]
    assert after["artifacts"] == before["artifacts"]  # with the seconds that the stages took
    assert "loss=" not in done.stdout


def test_the_tokenizer_that_01_saved_is_the_one_all_steps_use(whole, tiny_model_folder, monkeypatch):
    monkeypatch.setattr(vocabulary, "extend", None)  # made once
    lexicon = task.lexicon(str(tiny_model_folder), whole / "terms.json", whole / "tokenizer")
    expected = {term: lexicon.new(f" {term}").input_ids for term in WORDS}
    assert {term: [i] for term, i in lexicon.ids.items()} == expected
    for term, (i,) in expected.items():
        assert lexicon.splits[i] == lexicon.old(f" {term}").input_ids
    for folder in ("new/init", "new/c2"):
        saved = (whole / folder / "tokenizer.json").read_text()
        assert saved == (whole / "tokenizer" / "tokenizer.json").read_text()
    assert lexicon.new.padding_side == lexicon.old.padding_side


def test_a_term_with_fewer_windows_than_asked_is_accepted_and_said(repo, own, whole):
    """A list needs `least_windows`; how many texts of it are shown is another matter."""
    asked = [*own, "texts_a=1000"]
    done = run(repo, "01_data", "--run", "few3", *asked)
    rows = rows_of(repo, "few3", "01_data")
    least = next(r["value"] for r in rows if r["metric"] == "least_training_windows_of_a_term")
    assert f"least_windows_of_a_term={least}" in done.stdout.splitlines()[-1] and 20 <= least < 1000
    shown = run(repo, "03_train", "--run", "few3", *asked)
    assert shown.returncode == 0, shown.stderr
    assert f"3 of 3 terms have fewer than the 1006 windows asked for, the fewest {least}" in shown.stdout
    more = run(repo, "01_data", "--run", "bad3", *own, f"least_windows={least + 1}")
    one_line(more, f"in {least} training", f"{least + 1} and 4 needed")


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
    done = run(repo, "01_data", "--run", "no3", *own[2:], "--model", str(tiny_encoder_folder))
    one_line(done, "has no EOS token")


def test_a_sentencepiece_tokenizer_is_refused_before_any_work(repo, own, tiny_model_folder, tmp_path):
    """Mistral 7B's and Gemma's kind: a BPE whose entries are characters, with a sign for the blank."""
    entries = ["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    backend = Tokenizer(BPE({entry: i for i, entry in enumerate(entries)}, [], unk_token="<unk>"))
    backend.normalizer, backend.decoder = Replace(" ", "▁"), decoders.Replace("▁", " ")
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model, ignore=shutil.ignore_patterns("tokenizer*", "special*"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(model)
    done = run(repo, "01_data", "--run", "no3", "--model", str(model), "--data", str(repo / "nothing.jsonl"))
    one_line(done, "BPE over characters, as SentencePiece makes it", "byte-level BPE")
    assert not any((repo / place / "no3").exists() for place in ("results", "runs"))
