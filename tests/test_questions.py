"""The questions in people's words: each names functions of the test split and copies no docstring."""

import json

import pytest

from pipeline import results
from sources import corpus

PATH = results.ROOT / "task2_encoder" / "questions.jsonl"
RUN = 4  # so many consecutive words in common with a summary count as copied


@pytest.fixture(scope="module")
def questions():
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows():
    return corpus.load()[0]


def runs_of_words(text: str) -> set[tuple[str, ...]]:
    words = corpus.normalise(text).split()
    return {tuple(words[i:i + RUN]) for i in range(len(words) - RUN + 1)}


def test_rows_are_many_unique_and_short(questions):
    assert len(questions) >= 150
    for row in questions:
        assert row.keys() == {"question", "functions"}
        assert isinstance(row["question"], str) and 0 < len(row["question"].strip()) <= 200, row
        assert row["functions"] and len(set(row["functions"])) == len(row["functions"]), row
    texts = [corpus.normalise(row["question"]) for row in questions]
    assert all(texts)
    assert sorted(set(texts)) == sorted(texts)


def test_every_function_is_one_of_the_test_split(questions, rows):
    known = {f"{row['module']}.{row['qualname']}" for row in rows if row["split"] == "test"}
    missing = sorted({name for row in questions for name in row["functions"]} - known)
    assert not missing, f"not in the test split of {corpus.versions()}: {missing}"


def test_no_question_repeats_four_words_of_a_summary(questions, rows):
    summaries = {run: row["summary"] for row in rows for run in runs_of_words(row["summary"])}
    copied = [(row["question"], " ".join(run), summaries[run]) for row in questions
              for run in runs_of_words(row["question"]) if run in summaries]
    assert not copied, copied


def test_the_check_for_copied_words_sees_four_but_not_three():
    summary = runs_of_words("Find shortest weighted paths in G from a source node.")
    assert runs_of_words("what are SHORTEST, weighted paths in a town?") & summary
    assert not runs_of_words("shortest weighted paths of a town") & summary
