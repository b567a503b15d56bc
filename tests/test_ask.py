"""`make ask`: before and after of one prompt, on the small runs of each task."""

import os
import subprocess

import pytest

from pipeline import results
from tests import forked, small
from tests.conftest import one_line


def ask(steps, task: str, text: str, *more: str):
    """What ask.py says about the small run of a task, whose base is named by its place."""
    model = steps.arguments[steps.arguments.index("--model") + 1]
    return forked.run(steps.root, "ask.py", [task[4], text, "--run", small.RUN, "--model", model, *more], 300)


@pytest.mark.parametrize(("task", "text", "lines"), [
    ("task1_decoder", "Which number has the row counted from river", 1),
    ("task2_encoder", "river every stone 4", 5),
    pytest.param("task3_tokenizer", "the river Zorbex quiet", 2, marks=pytest.mark.all)])
def test_base_and_tuned_are_shown_side_by_side(task, text, lines, steps):
    own = steps(task)
    own.reach("03_train")
    own.restore("04_eval")  # other tests use the same run
    done = ask(own, task, text)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout[done.stdout.index("before:"):].rstrip("\n")
    before, after = said.split("\nafter:\n")
    before = before.removeprefix("before:\n")
    assert before.count("\n") == after.count("\n") == lines - 1
    if task != "task1_decoder":  # whose tiny models may both say nothing
        assert before != after
    if task == "task3_tokenizer":
        tokens = [int(part.split()[0]) for part in (before, after)]
        assert tokens[1] < tokens[0] and "' Zorbex' " in after and "' Zorbex' " not in before


def test_what_cannot_be_asked_is_one_line(steps):
    own = steps("task1_decoder")
    own.reach("03_train")
    one_line(ask(own, "task1_decoder", " "), "nothing asked")
    one_line(forked.run(own.root, "ask.py", ["1", "x", "--run", "none"], 60), "results/none", "is missing")


def test_make_hands_the_prompt_over_as_it_is():
    text = """it's "quoted", a `tick` and $HOME"""
    said = subprocess.run(["make", "-s", "ask", "PY=echo", "TASK=2"], cwd=results.ROOT, check=True,
                          env=os.environ | {"PROMPT": text}, capture_output=True, text=True).stdout
    assert said.strip() == f"ask.py 2 {text} --run mine"
