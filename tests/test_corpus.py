"""The corpus: what is kept, what counts as a duplicate or a leak. Own data: what is read, what is refused."""

import csv
import json

import pyarrow.parquet
import pytest

from common import corpus, data

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
    lines = "\n".join(f"    total_{i} = sum(n * {i} for n in items if n > {i})" for i in range(20))
    loop, renamed = f"def f(items):\n{lines}", f"def g(items):\n{lines.replace('total_7', 'result_7')}"
    other = "def h(path):\n    with open(path) as stream:\n        return stream.read().splitlines()"
    assert corpus.near_duplicates([loop, other, renamed]) == [None, None, 0]


def test_planted_leaks_are_counted():
    train = [{"summary": "Return the mean of a list.",
              "code": "def mean(values):\n    return sum(values) / len(values)"}]
    loop = "def average(xs):\n    s = 0\n    for x in xs:\n        s += x\n    return s / len(xs)"
    held_out = [{"summary": "return the MEAN of a list", "code": loop},
                {"summary": "Average some numbers.", "code": train[0]["code"].replace("mean", "average")}]
    assert corpus.leaks(train, held_out) == {"same_summary": 1, "same_body": 1, "near_duplicate": 1}


def test_deduplicate_keeps_the_first_and_drops_a_summary_that_the_code_repeats():
    row = {"summary": "Return the mean of values.", "code": "def f(v):\n    return sum(v) / len(v)"}
    leaked = {"summary": "Read the whole file now.",
              "code": "def g(p):\n    raise OSError('read the whole file now')"}
    kept, counts = corpus.deduplicate([row, {**row, "summary": "return the mean of values"}, leaked])
    assert kept == [row]
    assert counts == {"parsed": 3, "same_summary": 1, "same_body": 0, "near_duplicate": 0,
                      "summary_in_code": 1, "kept": 1}


# ------------------------------------------------------------------------------------------------ own data

COLUMNS = (("prompt", "completion"), ("text",))
ROWS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def test_jsonl_csv_and_parquet_give_the_same_rows(tmp_path):
    """Texts stay texts: no NaN, no numbers, no line broken at a separator that is no line feed."""
    table = [*ROWS, {"prompt": "NA", "completion": "007"},
             {"prompt": "two\nlines\u2028here", "completion": 200_000 * '"'}]
    more = [{**row, "extra": 1} for row in table]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in more)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8-sig", newline="")
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as stream:
        writer = csv.DictWriter(stream, more[0])
        writer.writeheader()
        writer.writerows(more)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(more), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        assert data.read_table(str(tmp_path / name), COLUMNS, 1) == table, name


@pytest.mark.parametrize(("name", "content", "words"), [
    ("missing.jsonl", None, ["No such file"]),
    ("empty.jsonl", "", ["no rows", "prompt+completion or text"]),
    ("empty.csv", "text\n", ["no rows"]),
    ("wrong.jsonl", '{"question": "a", "answer": "b"}', ["row 1", "question, answer", "or text"]),
    ("few.jsonl", LINES, ["3 rows", "at least 10", "n_test=.. n_dev=.."]),
    ("broken.jsonl", LINES + "{oops\n", ["line 4", "not a JSON object"]),
    ("list.jsonl", "[1]\n", ["line 1", "not a JSON object"]),
    ("gap.jsonl", LINES + '{"prompt": "x", "completion": " "}', ["row 4", "'completion'"]),
    ("number.jsonl", LINES + '{"prompt": 5, "completion": "x"}', ["row 4", "'prompt' is 5"]),
    ("bytes.jsonl", LINES.encode() + b'{"prompt": "caf\xe9"}\n', ["line 4", "not UTF-8", "0xe9"]),
    ("gap.csv", "text,other\na,b\n,c\n", ["row 2", "'text' is ''"]),
    ("comma.csv", "text\nfine\none, two\n", ["row 2", "[' two']"]),
    ("bytes.csv", b"text\ncaf\xe9\n", ["line 2", "not UTF-8"]),
    ("bad.parquet", "not parquet", ["not a parquet file"]),
    ("odd.txt", "x", ["'corpus'", ".jsonl, .csv, .parquet", "hub id"])])
def test_bad_data_is_one_line_with_file_and_row(tmp_path, name, content, words):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        data.read_table(str(path), COLUMNS, 10)
    said = str(stop.value)
    assert "\n" not in said and all(word in said for word in [f"DATA={path}", *words]), said
