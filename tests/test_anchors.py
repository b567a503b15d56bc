"""Other anchors for training, on worked examples: a summary asked back, a later sentence."""

import pytest

from task2_encoder import anchors


@pytest.mark.parametrize(("summary", "expected"), [
    ("Compute the shortest path.", "how to compute the shortest path"),
    ("Computes the shortest path. Slow.", "how to compute the shortest path"),
    ("Applies a filter to x", "how to apply a filter to x"),
    ("Matches two lists:", "how to match two lists"),
    ("Uses ``x`` and :func:`~m.y` to solve *A*.", "how to use x and m.y to solve A"),
    ("Return True if G has an edge, False otherwise.", "how to check if G has an edge"),
    ("Returns true iff the tree is empty, else False", "how to check if the tree is empty"),
    ("Return whether x is a number", "how to check whether x is a number"),
    ("Return a copy of the list.", "how to get a copy of the list"),
    ("Returns a copy.", "how to get a copy"),
    ("The shortest path of two nodes", None),
    ("Helper of the other function", None),
    ("Sort it.", None)])
def test_a_summary_that_is_a_command_becomes_a_question(summary, expected):
    assert anchors.question(summary) == expected


DOC = """Compute the mean. It is the usual one.

See the notes below for details of it.

    indented = code.that_is("no prose at all")

>>> mean([1, 2]) is what this returns here.

- A list of the things that it does.

The mean of no values is an error. Values that are missing
count for ``nothing`` here.

Parameters
----------
x : list
    Values of which the average is wanted.

This is a sentence of the last section.
"""


def test_a_later_sentence_is_prose_that_does_not_say_the_name():
    assert anchors.later("m.mean", DOC) == "Values that are missing count for nothing here."
    assert anchors.later("m.average", DOC) == "The mean of no values is an error."
    assert anchors.later("m.mean", DOC.replace("missing", "mean")) is None
    for heading in ("Args:", "Parameters\n----------"):
        assert anchors.later("m.f", f"Do it.\n\n{heading}\n\nThis is what is said later on.") is None
    long = " ".join(["word"] * 30)
    assert anchors.later("m.f", f"Do it.\n\nToo short.\n\nHere every {long}.\n\nThis fits well enough.") == (
        "This fits well enough.")


def test_a_row_has_the_anchors_that_there_are():
    assert anchors.alternatives("m.stats.mean", "The mean of a list", DOC) == {
        "later": "Values that are missing count for nothing here."}
