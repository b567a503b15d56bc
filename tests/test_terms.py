"""Finding words that deserve a token, and reading the list a person made instead."""

import math

import pytest

from task3_tokenizer import terms

GENERAL = ["the cat sat on the mat and the dog ran to the house"] * 30


def test_words_are_counted_after_a_space_and_once_per_document():
    texts = [" NetworkX and the NetworkX library", " (NetworkX) x2 sub-graph", " the NetworkX."]
    occurrences, documents = terms.count(texts)
    assert occurrences["NetworkX"] == 3 and documents["NetworkX"] == 2 and occurrences["sub-graph"] == 1


def test_keyness_worked_by_hand():
    """10 of 100 here, 10 of 900 there, overall rate 0.02: G2 = 2 (10 ln(10/2) + 10 ln(10/18))."""
    g2 = 2 * (10 * math.log(5) + 10 * math.log(10 / 18))
    assert terms.keyness(10, 100, 10, 900) == pytest.approx(math.sqrt(g2))
    assert terms.keyness(10, 900, 10, 100) == pytest.approx(-math.sqrt(g2))


def test_domain_words_come_first_and_rejections_say_why(tokenizer):
    train = ["an undirected NetworkX graph with float64 and sub-graph values"] * 12
    train += ["a Chebyshev node"] * 4 + ["the cat and the dog"] * 20
    rows = terms.find(tokenizer, train, train[::3], GENERAL, least=6, least_held_out=3)
    found = {row["term"]: row for row in rows}
    accepted = [term for term, row in found.items() if row["rejected"] is None]
    assert set(accepted) == {"undirected", "NetworkX"} and "cat" not in found and "graph" not in found
    pieces = found["undirected"]["pieces"]
    assert len(pieces) == 3 and "".join(pieces) == " undirected"
    assert found["Chebyshev"]["rejected"] == "in 4 training documents, 6 needed"
    assert found["float64"]["rejected"] == "has digits"
    assert found["sub-graph"]["rejected"] == "has punctuation"
    assert accepted[0] == "undirected"  # three pieces save two tokens a use, NetworkX's two save one


def write(tmp_path, text, encoding="utf-8"):
    (tmp_path / "terms.csv").write_text(text, encoding=encoding)
    return tmp_path / "terms.csv"


HEAD = "term,anchors,negative_anchors,definition\n"


def test_a_hand_made_list_is_read(tokenizer, tmp_path):
    lines = "NetworkX,graph network,food,a graph library\nкрипта,,,деньги\n"
    first, second = terms.read_terms(write(tmp_path, HEAD + lines), tokenizer)
    assert first == {"term": "NetworkX", "anchors": ["graph", "network"], "negative_anchors": ["food"]}
    assert second["anchors"] == []


@pytest.mark.parametrize(("text", "reason"), [
    ("", "expected columns term, anchors"), (HEAD, "expected columns"),
    ("term,anchors\nNetworkX,graph\n", "expected columns"),
    (HEAD + "graph,,,x\n", "in the vocabulary already"),
    (HEAD + "NetworkX,,,x\nNetworkX,,,x\n", "stands twice"),
    (HEAD + "NetworkX,Chebyshev,,x\n", "line 2: anchor 'Chebyshev' of 'NetworkX' is 4 tokens")])
def test_a_bad_list_is_one_line(tokenizer, tmp_path, text, reason):
    with pytest.raises(SystemExit) as error:
        terms.read_terms(write(tmp_path, text), tokenizer)
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_other_encodings_are_refused(tokenizer, tmp_path):
    with pytest.raises(SystemExit, match="not UTF-8"):
        terms.read_terms(write(tmp_path, HEAD + "крипта,,,деньги\n", encoding="cp1251"), tokenizer)
