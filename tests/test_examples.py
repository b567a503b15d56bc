"""The examples of own data: what is in them, and the very commands that their pages show."""

import csv
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from pipeline import results
from report import render
from tests import forked
from tests.conftest import SHARED

EXAMPLES = results.ROOT / "examples"
# What takes a person minutes takes the tests seconds: these knobs go behind the command's own.
SHORTER = {"task1": "n_test=12 n_dev=8 max_steps=6 eval_every=3 n_benchmark=4 n_general=4 max_new_tokens=12",
           "task2": "max_steps=4 eval_every=2 n_general=24",
           "task3": "batch_size=2"}  # a stage's first step is the warm-up's, at rate 0: one trains nothing
TICKET = re.compile(r"(T\d+|GO|BAR)( / \d+ [A-Z]{3}( [=+-][a-z]+)*)+( / ![a-z]+)?")


def commands() -> dict[str, str]:
    """{run: command} of every `make task..` that stands as a block of code in examples/README.md."""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.findall(r"^    (make task\d .*)$", text, flags=re.MULTILINE)
    return {re.search(r"\bRUN=(\S+)", command)[1]: " ".join(command.split()) for command in found}


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def orders() -> list[dict]:
    with open(EXAMPLES / "orders.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=";"))


def texts_of_notes() -> list[str]:
    files = (EXAMPLES / "notes").iterdir()
    return [text for file in files for text in file.read_text(encoding="utf-8").split("\n\n")]


# ------------------------------------------------------------------------------------------ what is in them

def test_every_ticket_is_in_the_notation():
    questions = rows("benchmark.jsonl")
    tickets = [row["ticket"] for row in orders()] + [text for row in questions for text in row["choices"]]
    assert [text for text in tickets if not TICKET.fullmatch(text)] == []
    assert all(len(set(row["choices"])) == 4 for row in questions)
    assert Counter(row["answer"] for row in questions) == dict.fromkeys(range(4), 5)
    # what the benchmark asks is not learnt by heart
    assert not {row["order"] for row in questions} & {row["order"] for row in orders()}


def test_every_letter_is_answered_in_the_form_of_the_workshop():
    for row in rows("pisma.jsonl"):
        system, *others = row["messages"]
        assert system["role"] == "system"
        assert [message["role"] for message in others] == ["user", "assistant"] * (len(others) // 2)
        for number, message in enumerate(others[1::2]):
            assert message["content"].endswith(" Мастерская «Шило»")
            assert message["content"].startswith("Здравствуйте!") == (number == 0)


def test_the_page_names_every_file_and_its_size():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.iterdir() if f"({path.name})" not in page] == ["README.md"]
    answers = {row["answer"] for row in rows("faq.jsonl")}
    for said in (f"{len(orders())} orders", f"{len(rows('pisma.jsonl'))} letters",
                 f"{len(rows('faq.jsonl'))} questions", f"{len(answers)} answers",
                 f"{len(texts_of_notes())} texts", f"{len(rows('benchmark.jsonl'))} questions"):
        assert said in page, said


def test_readme_shows_the_commands_of_the_examples():
    text = (results.ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    shown = re.findall(r"make task\d [^`\n]*DATA=examples/[^`\n]*", text)
    assert {" ".join(command.split()) for command in shown} <= set(commands().values())
    assert shown


# --------------------------------------------------------------------------------------------- the commands

@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the code and the examples, that only these tests write into."""
    root = tmp_path_factory.mktemp("examples")
    folders = [*(results.ROOT / name for name in SHARED), EXAMPLES,
               *filter(Path.is_dir, results.ROOT.glob("task*"))]
    for folder in folders:
        shutil.copytree(folder, root / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(results.ROOT / "Makefile", root)
    (root / "runs").mkdir()
    (root / "runs" / "assets").symlink_to(results.ROOT / "runs" / "assets")
    return root


@pytest.fixture(scope="module")
def models_of(tiny_model_folder, tiny_encoder_folder):
    return {"task1": tiny_model_folder, "task2": tiny_encoder_folder, "task3": tiny_model_folder}


def steps(root, run: str) -> list[list[str]]:
    """[script, argument, ...] of each step, as make would start it with the smoke profile."""
    command = [*shlex.split(commands()[run]), "PROFILE=smoke", "PY=python3"]
    command.insert(1, "-n")  # print the commands, run none
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [shlex.split(line) for line in re.findall(r"1\) python3 +(\S+\.py .*?) *;;", said)]


def make(root, run: str, model, more: str = "", last: int = 4) -> dict[str, int]:
    """The counts in 01's result, after `last` steps of a command, with the knobs `more`, have ended well."""
    for script, *arguments in steps(root, run)[:last]:
        done = forked.run(root, script, [*arguments, *more.split(), "--model", str(model)], timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    result, = (root / "results" / run).glob("*/01_data.json")
    found = json.loads(result.read_text())["rows"]
    assert not any(row["value"] for row in found if row["table"] == "leaks" and "bm25" not in row["metric"])
    # a run of its own: nothing else is written
    assert {path.name for path in (root / "results").iterdir()} <= set(commands())
    return {row["metric"]: row["value"] for row in found if row["table"] == "counts"}


def task_data(run: str) -> str:
    return re.search(r"\bDATA=(\S+)", commands()[run])[1]


def knob(run: str, name: str) -> int:
    return int(re.search(rf"\b{name}=(\d+)", commands()[run])[1])


@pytest.mark.parametrize("run, total", [("orders", len(orders())), ("pisma", len(rows("pisma.jsonl")))])
def test_all_rows_for_the_decoder_are_kept_and_go_where_the_command_says(copy, models_of, run, total):
    counts, held_out = make(copy, run, models_of["task1"], last=1), (knob(run, "n_test"), knob(run, "n_dev"))
    assert counts["parsed"] == counts["kept"] == total
    assert (counts["test"], counts["dev"], counts["train_pool"]) == (*held_out, total - sum(held_out))


def test_questions_of_one_answer_stay_together(copy, models_of):
    counts, pairs = make(copy, "faq", models_of["task2"], last=1), rows("faq.jsonl")
    assert counts["pairs"] == counts["kept"] == len(pairs)
    assert counts["groups"] == len({row["answer"] for row in pairs}) < len(pairs)
    assert counts["test"] >= knob("faq", "n_pool") and counts["dev"] >= knob("faq", "n_dev")


def test_the_notes_have_texts_enough_for_each_word(copy, models_of):
    counts = make(copy, "notes", models_of["task3"], last=1)
    assert counts["documents"] == len(texts_of_notes()) and counts["terms_taken"] == 4
    assert counts["least_training_windows_of_a_term"] >= knob("notes", "least_windows")


@pytest.mark.faults
@pytest.mark.parametrize("run", ["orders", "pisma", "faq", "notes"])
def test_every_step_of_a_command_ends_well(copy, models_of, run, record):
    task = commands()[run].split()[1]
    make(copy, run, models_of[task], SHORTER[task])
    result, = (copy / "results" / run).glob("*/04_eval.json")
    found = json.loads(result.read_text())["rows"]
    assert any("verdict" in row for row in found)
    if run == "orders":  # the benchmark is scored before and after, item by item
        deltas = [row for row in found if row["name"] == "delta"]
        assert {row["n"] for row in deltas if row["table"] == "own order_choice"} == {4}
        data = json.loads(result.with_name("01_data.json").read_text())["rows"]
        shown = "".join(row["token"] for row in data if row["table"] == "example" and row["trained"])
        assert [row for row in orders() if row["ticket"] in shown], shown  # the printed example is an own row
    root = copy / "results"  # the pages of own data: of one run, and of two side by side
    page = render.pages(root, render.load_all(root, run))[result.with_name("README.md")]
    assert "## Verdict" in page and f"<code>examples/{Path(task_data(run)).name}</code>" in page
    (pair, text), = [(path, text) for path, text in render.side_by_side(root, run, run).items()
                     if path.suffix == ".md"]
    assert pair.parent.name == result.parent.name and "no difference shown" in text
    record("opens elsewhere", what=f"README's own-data command of run {run}, a tiny model", tool="make",
           checked="four steps and a page; rows", figure=len(found), result="ok")
