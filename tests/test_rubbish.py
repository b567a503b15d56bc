"""Generated rubbish through each door: rows or one line, never a traceback, never five seconds; and nothing
from data gets into a report as markup, as another row, or as a character that nobody sees.

30 cases a door, 1,000 with --hypothesis-profile=faults; the same ones every time.
"""

import copy
import io
import json
import os
import re
import shutil
import time
import unicodedata
from collections import Counter

import jinja2
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import results
from report import render
from sources import data
from task3_tokenizer import terms

PAIRS = (("prompt", "completion"), ("messages",), ("text",))
ODD = ["\r", "\n", "\r\n", "\x00", "\ufeff", "\u2028", "\x85", '"', "'", "\\", ",", ";", "\t", "{", "}",
       "[]", "[" * 3000, '{"a":' * 3000, "\\ud800", "\ud800", "NaN", "-Infinity", "1e999", "9" * 5000, "null",
       "\x1b[31m", "\u202e", "\u200b", "prompt", "completion", "text", " ", "a" * 200_000]
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
                    max_leaves=8)


def csv_of(rows: list[dict]) -> bytes:
    """As pandas writes it, without NUL, which the csv module of Python 3.10 refuses to write."""
    table = pandas.DataFrame(rows).replace("\0", "", regex=True)
    return table.to_csv(index=False).encode("utf-8", "surrogatepass")


TEXT_ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(("prompt", "completion"), st.text(min_size=1))),
                     max_size=4)
ROW = st.fixed_dictionaries({}, optional={"prompt": JSON, "completion": JSON, "text": JSON, "messages": JSON,
                                          "name": JSON})
CHAT = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
CELLS = [pyarrow.array(*cells) for cells in (
    (["a", "", None],), (["a" * 1000, "\r\n", "\u202e"], pyarrow.large_string()), ([b"\xff", b"a", None],),
    ([1, -1, None],), ([1.5, float("nan"), None],), ([True, False, None],), ([["a"], [], None],),
    ([CHAT] * 3,), ([CHAT[0]] * 3,), ([0, 2 ** 62, None], pyarrow.timestamp("ns")),
    ([0, 2 ** 60, -1], pyarrow.duration("s")),
    ([0, 2 ** 31 - 1, None], pyarrow.date32()), ([None] * 3,), ([2 ** 40] * 3, pyarrow.timestamp("s")))]
CELLS.append(pyarrow.array(["a", "b", None]).dictionary_encode())


def spoiled(whole: bytes):
    """`whole` with some places replaced by odd characters, bytes or nothing."""
    piece = st.sampled_from([text.encode("utf-8", "surrogatepass") for text in ODD]) | st.binary(max_size=8)
    edit = st.tuples(st.integers(0, len(whole)), st.integers(0, 12), piece)

    def made(edits):
        text = whole
        for place, length, new in edits:
            text = text[:place] + new + text[place + length:]
        return text
    return st.lists(edit, min_size=1, max_size=4).map(made)


def lines(rows) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


WHOLE = lines({"prompt": f"Question {i}?", "completion": f"Answer «{i}», yes"} for i in range(8))
TABLE = b'prompt,completion\n"a, ""b""",c\nd,"e\nf"\n' + b"g,h\n" * 5


def parquet(table: pyarrow.Table) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


COLUMNS = st.dictionaries(st.sampled_from(["prompt", "completion", "text", "messages", "\u202e", ""]),
                          st.sampled_from(CELLS), min_size=1, max_size=3)
TABLES = st.tuples(COLUMNS, st.integers(0, 3)).map(
    lambda drawn: parquet(pyarrow.table(drawn[0]).slice(0, drawn[1])))
FILES = {
    ".jsonl": [st.binary(max_size=300), spoiled(WHOLE), st.lists(ROW, max_size=6).map(lines),
               TEXT_ROWS.map(lines)],
    ".json": [st.binary(max_size=300), spoiled(b"[" + WHOLE.replace(b"\n", b",") + b"]"),
              JSON.map(lambda value: json.dumps(value).encode())],
    ".csv": [st.binary(max_size=300), spoiled(TABLE), st.text(alphabet='ab",;\t\r\n ', max_size=80).map(
        lambda text: f"text,x\n{text}".encode()), TEXT_ROWS.map(csv_of)],
    ".tsv": [spoiled(TABLE.replace(b",", b"\t"))],
    ".parquet": [st.binary(max_size=300), TABLES, spoiled(parquet(pyarrow.table(
        {"prompt": [f"Question {i}?" for i in range(50)], "completion": ["yes", "no"] * 25})))],
}


def answered(call, seen: Counter) -> object:
    """What `call()` returned, or None if it refused in one line; counted in `seen`, with the slowest case."""
    started, value = time.perf_counter(), None
    try:
        value = call()
        seen["read"] += 1
    except SystemExit as err:
        said = str(err)
        assert said and len(said.split("\n")) == 1 and "\r" not in said, repr(said)
        seen["refused"] += 1
    seconds = time.perf_counter() - started
    assert seconds < 5
    seen["slowest_ms"] = max(seen["slowest_ms"], round(1000 * seconds))
    return value


def kept(record, door: str, seen: Counter) -> None:
    assert seen["read"] + seen["refused"] >= 25
    record("rubbish", door=door, cases=seen["read"] + seen["refused"], read=seen["read"],
           refused_in_one_line=seen["refused"], slowest_ms=seen["slowest_ms"], result="ok")


@pytest.mark.parametrize("suffix", FILES)
def test_a_data_file_is_read_or_refused_in_one_line(suffix, tmp_path, record):
    seen, file = Counter(), tmp_path / f"rows{suffix}"

    @given(st.one_of(FILES[suffix]))
    def one(content):
        file.write_bytes(content)
        rows = answered(lambda: data.read_table(str(file), PAIRS, 1), seen)
        for row in rows or []:
            texts = [row[name] for name in ("prompt", "completion", "text") if name in row]
            assert texts and all(text.strip() for text in texts)
            "".join(texts).encode()
    one()
    kept(record, f"data: {suffix} file", seen)


def test_a_folder_of_texts_is_read_or_refused_in_one_line(tmp_path, record):
    seen, folder = Counter(), tmp_path / "texts"
    names = st.text(alphabet="abя.\u202e \n-", min_size=1, max_size=12).filter(lambda name: name.strip(". "))
    content = st.binary(max_size=60) | st.text().map(lambda text: text.encode("utf-8", "surrogatepass"))

    @given(st.dictionaries(names, content, max_size=4))
    def one(files):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in files.items():
            (folder / f"{name}.txt").write_bytes(text)
        answered(lambda: data.read_table(str(folder), (("text",),), 1), seen)
    one()
    kept(record, "data: folder of texts", seen)


def test_any_name_of_a_source_is_answered_in_one_line(record, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # "" is the folder one is in, of which all texts are read
    seen, hub_id = Counter(), re.compile(r"[\w.@:-]+/[\w.@:-]+")

    @given(st.text(max_size=40) | st.text(alphabet="~/.:@ ax\n", max_size=8))
    def one(name):
        if hub_id.fullmatch(name) or os.path.exists(os.path.expanduser(name)):
            return  # a hub is asked, or all texts below "/" are read
        answered(lambda: data.read_table(name, PAIRS, 1), seen)
    one()
    kept(record, "data: name of the source", seen)


def test_a_list_of_terms_is_read_or_refused_in_one_line(tmp_path, tokenizer, record):
    seen, file = Counter(), tmp_path / "terms.csv"
    whole = "term,anchors,negative_anchors,definition\nZorbex,river stone,paper,a thing\nкриптик,,,деньги\n"

    @given(spoiled(whole.encode()) | st.binary(max_size=200).map(whole.encode().__add__))
    def one(content):
        file.write_bytes(content)
        for row in answered(lambda: terms.read_terms(file, tokenizer), seen) or []:
            assert row["term"].strip()
    one()
    kept(record, "list of terms", seen)


# ------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A copy of the committed results."""
    root = tmp_path_factory.mktemp("rubbish") / "results"
    for name in (*results.REFERENCE, "bench"):
        shutil.copytree(results.ROOT / "results" / name, root / name)
    return root


def test_a_spoiled_result_is_read_or_refused_in_one_line(stored, record):
    path = stored / "cpu" / "task1_decoder" / "04_eval.json"
    seen, whole = Counter(), path.read_bytes()

    @given(st.binary(max_size=200) | spoiled(whole) | JSON.map(lambda value: json.dumps(value).encode())
           | st.sampled_from([b"", whole[:1000], whole[:-2], whole + whole]))
    def one(content):
        path.write_bytes(content)
        answered(lambda: render.load_all(stored), seen)
    try:
        one()
    finally:
        path.write_bytes(whole)
    kept(record, "result file", seen)


def places(value, at=()):
    """The keys that lead to each part of a JSON value."""
    for key in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        yield (*at, key)
        yield from places(value[key], (*at, key))


@pytest.mark.faults
def test_a_result_with_another_value_renders_or_is_refused_in_one_line(stored, record):
    """A whole report for each case, so these are few."""
    path = stored / "cpu" / "task1_decoder" / "04_eval.json"
    seen, whole = Counter(), path.read_bytes()
    result = json.loads(whole)

    def rendered():
        try:
            return render.render(stored)
        except jinja2.UndefinedError as err:  # names the missing row
            raise SystemExit(str(err)) from None

    @settings(max_examples=60)
    @given(st.sampled_from(list(places(result))), st.none() | JSON)
    def one(keys, value):
        changed = copy.deepcopy(result)
        inner = changed
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        path.write_text(json.dumps(changed))
        answered(rendered, seen)
    try:
        one()
    finally:
        path.write_bytes(whole)
    kept(record, "report of a result edited by hand", seen)


# ------------------------------------------------------------------------------------------ text in a report

SAID = {"prompt", "before", "after", "item", "id", "token", "output_before", "output_after", "first_before",
        "first_after", "pieces", "rejected", "anchors", "negative_anchors", "definition_base",
        "definition_control", "definition_new", "near_input_init", "near_input_c2", "near_output_init",
        "near_output_c2"}  # columns of results that hold what data or models say
MARKUP = ["<script>", "<img src=x>", "![x](http://a/b)", "<!-- end -->", "]]>", "| a | b |", "\r", "\n\n",
          "# head", "```", "**b**", "<br>", "&lt;", "\u202e", "\u2066", "\u200b", "\u200f", "\ufeff",
          "\x1b[2J", "\x00", "www.x.org", "</code>", "{{ 1 }}", "{% x %}", "~~s~~"]
TEXTS = st.one_of(st.text(), st.text(alphabet=sorted(set("".join(MARKUP) + "&_!\\\"'\t\u2028"))),
                  st.lists(st.sampled_from(MARKUP)).map("".join))
INVISIBLE = {"Cc", "Cf", "Zl", "Zp", "Cs", "Co", "Cn"}


def test_what_data_and_models_say_is_markup_on_no_page(stored, tmp_path, record):
    """Every text of data or models in whole results, with a seal of its own, and every name of a source."""
    root, bad, changed = shutil.copytree(stored, tmp_path / "results"), "zq" + "".join(MARKUP), 0

    def spoil(values: dict, names: set[str]) -> int:
        texts = [name for name in names & values.keys() if isinstance(values[name], str)]
        lists = [name for name in names & values.keys() if isinstance(values[name], list)]
        values |= {name: bad for name in texts} | {name: [bad] * len(values[name]) for name in lists}
        return len(texts) + len(lists)
    for path in root.glob("*/task*/0*.json"):
        result = json.loads(path.read_text())
        changed += sum(spoil(row, SAID) for row in result["rows"])
        spoil(result["settings"], set(results.SOURCES) - {"model"})
        path.write_text(results.sealed(result))
    assert changed > 500
    pages = {path: text for path, text in render.render(root).items() if path.suffix == ".md"}
    assert sum(text.count("zq") for text in pages.values()) > 200
    for path, text in pages.items():
        for raw in ("<script>", "<img src", "![x]", "](http:", "<!-- end", "zq\n", "\r", "\x00", "\x1b",
                    "\u202e", "\u2066", "\u200b", "\u200f", "\ufeff"):
            assert raw not in text, (path, raw)
    record("rubbish", door="report of results with markup in every text", cases=changed, result="ok")


@pytest.mark.parametrize("show", [render.printed, render.code])
def test_no_text_becomes_markup_a_row_or_something_invisible(show, record):
    seen = Counter()

    @given(TEXTS)
    def one(text):
        out = str(show(text))
        out.encode()
        plain = re.sub(r"<br>|^<code>|</code>$", "", out)
        assert not set(plain) & set("<>|`*["), out
        assert len(out.splitlines()) <= 1, repr(out)  # also \x0b, \x85, U+2028: a row stays a row
        hidden = [c for c in out if unicodedata.category(c) in INVISIBLE and c not in "\u00ad"]
        assert not [c for c in hidden if unicodedata.category(c) != "Cn"], ascii(out)
        for entity in re.findall(r"&[^;\s]{0,12}", plain):
            assert re.match(r"&(#x?[0-9a-fA-F]+|nbsp|amp|lt|gt)$", entity), out
        seen["read"] += 1
    one()
    kept(record, f"text in a report: {show.__name__}", seen)
