"""The corpus: what is kept, what counts as a duplicate, that nothing held out leaks, and that own data is checked at the door."""

import csv
import json

import pytest

from common import corpus

SOURCE = '''
def area(radius):
    """Return the area of a circle.

    More text.
    """
    # a comment
    return 3.14159 * radius ** 2

class Shape:
    def scale(self, factor):
        """Scale the shape by a factor."""
        self.size *= factor

    def __repr__(self):
        """Represent the shape as text."""
        return "Shape"

def short(x):
    """Too short."""
    return x

def stub(x):
    """Do nothing at all here."""

def foreign(x):
    """Посчитать площадь круга по радиусу."""
    return x
'''


def test_only_documented_real_functions_are_kept_without_their_docstring():
    rows = corpus.functions_in(SOURCE, "shapes")
    assert [r["qualname"] for r in rows] == ["area", "Shape.scale"]
    assert [r["summary"] for r in rows] == ["Return the area of a circle.", "Scale the shape by a factor."]
    assert rows[0]["code"] == "def area(radius):\n    return 3.14159 * radius ** 2"


def test_near_duplicates_point_at_the_earlier_kept_one():
    loop = "def f(items):\n" + "\n".join(f"    total_{i} = sum(value * {i} for value in items if value > {i})" for i in range(20))
    renamed = loop.replace("def f", "def g").replace("total_7", "result_7")
    other = "def h(path):\n    with open(path) as stream:\n        return stream.read().splitlines()"
    assert corpus.near_duplicates([loop, other, renamed]) == [None, None, 0]


def test_planted_leaks_are_counted():
    train = [{"summary": "Return the mean of a list.", "code": "def mean(values):\n    return sum(values) / len(values)"}]
    loop = "def average(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s / len(xs)"
    held_out = [{"summary": "return the MEAN of a list", "code": loop},
                {"summary": "Average some numbers.", "code": "def average(values):\n    return sum(values) / len(values)"}]
    assert corpus.leaks(train, held_out) == {"same_summary": 1, "same_body": 1, "near_duplicate": 1}


def test_deduplicate_keeps_the_first_and_drops_told_summaries():
    row = {"module": "m", "qualname": "f", "docstring": "", "summary": "Return the mean of values.", "code": "def f(v):\n    return sum(v) / len(v)"}
    told = {**row, "summary": "Read the whole file now.", "code": "def g(p):\n    raise OSError('read the whole file now')"}
    kept, counts = corpus.deduplicate([row, {**row, "summary": "return the mean of values"}, told])
    assert kept == [row] and counts == {"parsed": 3, "same_summary": 1, "same_body": 0, "near_duplicate": 0, "summary_in_code": 1, "kept": 1}


def test_real_corpus_holds_out_whole_packages_and_shares_nothing():
    rows, counts = corpus.load()
    split = {name: [r for r in rows if r["split"] == name] for name in ("train", "dev", "test")}
    assert {r["package"] for r in split["test"]} == {"networkx", "sklearn"}
    assert {r["package"] for r in split["dev"]} == {"matplotlib"}
    assert not {r["package"] for r in split["train"]} & {"networkx", "sklearn", "matplotlib"}
    assert len(split["train"]) > 10_000 and counts["kept"] == len(rows) == len({r["id"] for r in rows})
    assert set(corpus.leaks(split["train"], split["test"]).values()) == {0}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows_of(n):
    return "".join(json.dumps({"prompt": f"Question {i}?", "completion": f"Answer {i}."}) + "\n" for i in range(n))


COLUMNS = (("prompt", "completion"), ("text",))


def test_jsonl_csv_and_parquet_give_the_same_rows(tmp_path):
    import pandas
    jsonl = write(tmp_path / "a.jsonl", rows_of(3))
    table = corpus.read_table(jsonl, COLUMNS, 1)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["prompt", "completion", "extra"])
        writer.writeheader()
        writer.writerows({**row, "extra": 1} for row in table)
    pandas.DataFrame(table).to_parquet(tmp_path / "a.parquet")
    assert table == corpus.read_table(str(tmp_path / "a.csv"), COLUMNS, 1) == corpus.read_table(str(tmp_path / "a.parquet"), COLUMNS, 1)
    assert len(table) == 3


@pytest.mark.parametrize(("name", "content", "words"), [
    ("missing.jsonl", None, ["no such file"]), ("empty.jsonl", "", ["no rows", "prompt+completion or text"]),
    ("wrong.jsonl", '{"question": "a", "answer": "b"}\n', ["row 1", "question, answer", "expected prompt+completion or text"]),
    ("few.jsonl", rows_of(3), ["3 rows", "at least 10"]), ("broken.jsonl", rows_of(2) + "{oops\n", ["line 3", "not JSON"]),
    ("gap.jsonl", rows_of(2) + '{"prompt": "x", "completion": " "}\n', ["row 3", "'completion'"]),
    ("bytes.jsonl", rows_of(1).encode() + b'{"prompt": "caf\xe9", "completion": "x"}\n', ["line 2", "not UTF-8", "0xe9"]),
    ("list.jsonl", "[1]\n", ["line 1", "expected a JSON object"]), ("bad.parquet", "not parquet", ["not a Parquet file"]),
    ("odd.txt", "x", ["expected 'corpus', a .jsonl"])])
def test_bad_data_is_one_line_with_file_and_row(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        corpus.read_table(str(path), COLUMNS, 10)
    assert "\n" not in str(stop.value)
    for word in [name, *words]:
        assert word in str(stop.value)
