"""Own data: what is read, what is refused in one line, and what is asked before anything slow is imported."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from pipeline import knobs, results
from sources import data, hub

COLUMNS = (("prompt", "completion"), ("messages",), ("text",))
ROWS = [{"prompt": f"Question {i}?", "completion": f"Answer {i}."} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TEXTS = data.FORMS["task3_tokenizer"]


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(call, *arguments, **more) -> str:
    with pytest.raises(SystemExit) as stop:
        call(*arguments, **more)
    said = str(stop.value)
    assert len(said.splitlines()) == 1, said
    return said


# -------------------------------------------------------------------------------------------------- formats

def test_every_format_gives_the_same_rows(tmp_path, capsys):
    """Texts stay texts: no NaN, no numbers, no line broken at a separator that is no line feed."""
    table = [*ROWS, {"prompt": "NA", "completion": "007"},
             {"prompt": "two\r\nlines\u2028he;re\t", "completion": 200_000 * '"'}]
    more = [{**row, "extra": "1"} for row in table]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in more)
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8-sig", newline="")
    (tmp_path / "a.json").write_text(json.dumps(more, indent=1))
    for name, separator, end in (("comma.csv", ",", "\r\n"), ("semicolon.csv", ";", "\n"),
                                 ("cr.csv", ",", "\r"), ("tab.csv", "\t", "\n"), ("tab.tsv", "\t", "\n")):
        with (tmp_path / name).open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, more[0], delimiter=separator, lineterminator=end)
            writer.writeheader()
            writer.writerows(more)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(more), tmp_path / "a.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert data.read_table(str(file), COLUMNS, 1) == table, file.name
        said = capsys.readouterr().out
        expected = {"semicolon.csv": "';'", "tab.csv": "'\\t'", "tab.tsv": "'\\t'"}.get(file.name)
        assert (expected in said and file.name in said) if expected else not said


def test_a_folder_of_texts_is_read_in_the_order_of_names(tmp_path):
    write(tmp_path / "b.txt", "second\nline\n \n\nanother text\n")
    write(tmp_path / "a.md", "# first")
    write(tmp_path / "in" / "c.txt", "third")
    write(tmp_path / "image.png", b"\x89PNG")
    texts = [row["text"] for row in data.read_table(str(tmp_path), COLUMNS, 1)]
    assert texts == ["# first", "second\nline", "another text", "third"]
    assert [row["name"] for row in data.rows_of(str(tmp_path))] == ["a.md", "b.txt", "b.txt", "in/c.txt"]
    write(tmp_path / "in" / "d.txt", " \n")
    assert "row 5 in/d.txt: 'text' is" in refused(data.read_table, str(tmp_path), COLUMNS, 1)
    write(tmp_path / "in" / "d.txt", b"caf\xe9")
    assert "d.txt, line 1: not UTF-8" in refused(data.read_table, str(tmp_path), COLUMNS, 1)
    (tmp_path / "empty").mkdir()
    assert "no rows" in refused(data.read_table, str(tmp_path / "empty"), COLUMNS, 1)


def chat_of(*texts: str, system: str = "") -> list[dict]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}] * bool(system) + turns


CHATS = [chat_of("Hi?", "Hello."), chat_of("A?", "B.", "And then?", "C.", system="Be brief.")]
FROM_CHATS = [{"prompt": "Hi?", "completion": "Hello.", "turns": [], "instruction": ""},
              {"prompt": "And then?", "completion": "C.", "turns": [("A?", "B.")],
               "instruction": "Be brief."}]


def test_chat_messages_are_lists_or_their_text(tmp_path):
    rows = [{"messages": chat} for chat in CHATS]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["messages"], *([json.dumps(chat)] for chat in CHATS)])
    for name in ("a.jsonl", "a.parquet", "a.csv"):
        assert data.read_table(str(tmp_path / name), COLUMNS, 1) == FROM_CHATS, name


ROLES = "expected user and assistant in turn"


@pytest.mark.parametrize(("messages", "words"), [
    (chat_of("Hi?"), ROLES),
    ([], ROLES),
    (chat_of("Hi?", "Hello.", "And?"), ROLES),
    (chat_of("Hi?", "Hello.")[::-1], ROLES),
    ([*chat_of("Hi?", "Hello."), {"role": "tool", "content": "4"}], "'tool'"),
    ([*chat_of("Hi?"), {"role": "bot", "content": "4"}], "'bot'"),
    ([*chat_of("Hi?", "Hello."), *chat_of("Hi?", "Hello.", system="late")], ROLES),
    ([*chat_of("Hi?"), {"role": "assistant", "content": "4", "tool_calls": [{"id": "1"}]}], "'tool call'"),
    ([*chat_of("Hi?"), {"role": "assistant", "content": None}], "'message 2' is None"),
    ([*chat_of("Hi?"), {"role": "assistant", "content": [{"type": "image_url"}]}], "'message 2' is [{"),
    (chat_of("Hi?", "\ud800"), "surrogates"),
    (chat_of("Hi?", " "), "'message 2' is ' '"),
    ([{"from": "human", "value": "Hi?"}], "no list of {role, content}"),
    ({"role": "user"}, "no list of {role, content}"), ("[1]", "no list of {role, content}"),
    ("{oops", "Expecting property name"), (None, "no list"), (5, "no list")])
def test_other_chats_are_refused(tmp_path, messages, words):
    rows = [{"messages": CHATS[0]}, {"messages": messages}]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    said = refused(data.read_table, file, COLUMNS, 1)
    assert "row 2" in said and words in said, said


def test_parts_of_a_hub_data_set_are_named(tmp_path, monkeypatch):
    assert hub.data_set("o/n") == ("o/n", None, "train")
    assert hub.data_set("o/n:en@v2") == ("o/n@v2", "en", "train")
    assert hub.data_set("o/n:en:test@refs/pr/1") == ("o/n@refs/pr/1", "en", "test")
    assert hub.data_set("o/n::test") == ("o/n", None, "test")
    for part in ("en-train", "en-test", "ru-train"):
        write(tmp_path / f"{part}.jsonl", json.dumps({"text": part}) + "\n")
    write(tmp_path / "README.md", "---\nconfigs:\n" + "".join(
        f"- config_name: {name}\n  data_files:\n" + "".join(
            f"  - split: {split}\n    path: {name}-{split}.jsonl\n" for split in splits)
        for name, splits in (("en", ("train", "test")), ("ru", ("train",)))) + "---\n")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda source, *more: asked.append(source) or (tmp_path, "c" * 40))
    for source, text in (("o/n:en", "en-train"), ("o/n:ru:train", "ru-train"), ("o/n:en:test@v2", "en-test")):
        assert data.read_table(source, COLUMNS, 1) == [{"text": text}]
    assert asked == ["o/n", "o/n", "o/n@v2"]
    assert "['en', 'ru']" in refused(data.read_table, "o/n", COLUMNS, 1)
    assert "['en', 'ru']" in refused(data.read_table, "o/n:de", COLUMNS, 1)
    assert "['train']" in refused(data.read_table, "o/n:ru:test", COLUMNS, 1)


# ------------------------------------------------------------------------------------------- what is refused

NAMES = "prompt+completion or messages or text"


@pytest.mark.parametrize(("name", "content", "words"), [
    ("missing.jsonl", None, ["No such file"]),
    ("empty.jsonl", "", ["no rows", NAMES]),
    ("empty.json", "[]", ["no rows"]),
    ("empty.csv", "text\n", ["no rows"]),
    ("nothing.csv", "", ["No columns"]),
    ("wrong.jsonl", '{"question": "a", "answer": "b"}',
     ["row 1", "question, answer", 'COLUMNS="prompt=question completion=answer"', NAMES]),
    ("alpaca.json", '[{"instruction": "a", "input": "b", "output": "c"}]',
     ['COLUMNS="prompt=instruction completion=output"']),
    ("blank.csv", "prompt,the answer\na,b\n", ["COLUMNS=\"completion='the answer'\""]),
    ("few.jsonl", LINES, ["3 rows", "at least 10", "n_test=.. n_dev=.."]),
    ("broken.jsonl", LINES + "{oops\n", ["line 4", "not a JSON object"]),
    ("list.jsonl", "[1]\n", ["line 1", "not a JSON object"]),
    ("lines.json", LINES, ["not a JSON object", "Extra data: line 2"]),
    ("deep.jsonl", "[" * 100_000, ["line 1", "not a JSON object"]),
    ("deep.json", '[{"a":' * 100_000, ["not a JSON object"]),
    ("gap.jsonl", LINES + '{"prompt": "x", "completion": " "}', ["row 4", "'completion' is ' '"]),
    ("none.jsonl", LINES + '{"prompt": "x"}', ["row 4", "'completion' is None"]),
    ("number.jsonl", LINES + '{"prompt": 5, "completion": "x"}', ["row 4", "'prompt' is 5"]),
    ("bytes.jsonl", LINES.encode() + b'{"prompt": "caf\xe9"}\n', ["line 4", "not UTF-8", "0xe9"]),
    ("half.jsonl", LINES + r'{"prompt": "a\ud800", "completion": "x"}', ["row 4", "surrogates"]),
    ("nul.jsonl", LINES + r'{"prompt": "a\u0000", "completion": "x"}', ["row 4", "'prompt' has a NUL"]),
    ("giant.jsonl", LINES + json.dumps({"prompt": "a" * 1_000_001, "completion": "x"}),
     ["row 4", "'prompt'", "1,000,001 characters"]),
    ("gap.csv", "text,other\na,b\n,c\n", ["row 2", "'text' is ''"]),
    ("comma.csv", "text\nfine\none, two\n", ["Expected 1 fields in line 3, saw 2"]),
    ("comma1.csv", "text\none, two\n", ["row 1 has more cells"]),
    ("open.csv", 'text,other\n"fine,x\n', ["EOF inside string starting at row 1"]),
    ("bytes.csv", b"text\ncaf\xe9\n", ["line 2", "not UTF-8"]),
    ("nul.csv", "text\na\0b\n", ["NUL"]),
    ("utf16.csv", "text\nfine\n".encode("utf-16"), ["not UTF-8"]),
    ("bad.parquet", "not parquet", ["not a parquet file"]),
    ("odd.txt", "x", ["'corpus'", ".jsonl, .json, .csv, .tsv, .parquet", "folder", "hub id"])])
def test_bad_data_is_one_line_with_file_and_row(tmp_path, name, content, words):
    path = str(tmp_path / name) if content is None else write(tmp_path / name, content)
    said = refused(data.read_table, path, COLUMNS, 10)
    assert all(word in said for word in [f"DATA={path}", *words]), said


def test_a_parquet_file_is_refused_by_what_it_unpacks_to(tmp_path, monkeypatch):
    file = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 900_000] * 3}), file, use_dictionary=False)
    assert os.path.getsize(file) < 900_000
    assert len(data.read_table(file, COLUMNS, 1)) == 3
    monkeypatch.setattr(data, "MOST_BYTES", 1_000_000)
    assert "bytes unpacked" in refused(data.read_table, file, COLUMNS, 1)


def test_damaged_parquet_is_one_line(tmp_path):
    """Every eighth byte of a small file turned round: rows or one line."""
    file, outcomes = tmp_path / "a.parquet", set()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    whole = file.read_bytes()
    for place in range(0, len(whole), 8):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
        try:
            outcomes.add(len(data.read_table(str(file), COLUMNS, 1)))
        except SystemExit as stop:
            assert len(str(stop).splitlines()) == 1
            outcomes.add("refused")
    assert "refused" in outcomes


# -------------------------------------------------------------------------------------------------- columns

def test_columns_are_renamed(tmp_path):
    rows = [{"question": "Q?", "answer": "A.", "prompt": "old", "the body": "text"}]
    file = write(tmp_path / "a.jsonl", json.dumps(rows[0]))

    def read(columns, alternatives=COLUMNS):
        return data.read_table(file, alternatives, 1, columns=columns)
    assert read("prompt=question completion=answer") == [{"prompt": "Q?", "completion": "A."}]
    assert read("completion=answer") == [{"prompt": "old", "completion": "A."}]
    assert read("completion=prompt prompt=answer") == [{"prompt": "A.", "completion": "old"}]
    assert read("text='the body'") == [{"text": "text"}]
    assert read("text=answer", TEXTS) == [{"text": "A."}]
    assert read("text=answer split=question", TEXTS) == [{"text": "A.", "split": "Q?"}]
    said = refused(read, "prompt=questoin completion=answer")
    assert "columns question, answer, prompt, the body" in said and 'COLUMNS="completion=question"' in said
    for wrong in ("question", "prompt", "prompt='question"):
        assert "as in COLUMNS=" in refused(read, wrong)
    for wrong in ("promt=question", "prompt=question text=answer", "prompt="):
        assert "expected columns prompt+completion or messages or text" in refused(read, wrong)


def test_task_3_takes_any_column_of_texts(tmp_path):
    file = write(tmp_path / "a.jsonl", LINES)
    assert data.read_table(file, TEXTS, 1) == [{"completion": row["completion"]} for row in ROWS]
    said = refused(data.read_table, write(tmp_path / "b.csv", "body,title\na,b\n"), TEXTS, 1)
    assert 'COLUMNS="text=body' in said and "text+split or text or completion or positive" in said


def test_mistakes_are_answered_without_the_large_libraries(tmp_path):
    """`check` gives the lines of the full readers, in a process that loads neither torch nor transformers."""
    good, chats = tmp_path / "good.jsonl", tmp_path / "chats.jsonl"
    write(good, LINES)
    write(chats, json.dumps({"messages": CHATS[0]}))
    write(tmp_path / "terms.csv", "term,anchors\na,b\n")
    file, one = str(good), "task1_decoder"
    cases = [
        (one, {}, None), (one, {"data": file, "instruction": ""}, None), (one, {"data": str(chats)}, None),
        (one, {"data": "o/n:en", "columns": "text=body"}, None), ("task3_tokenizer", {"data": file}, None),
        ("task3_tokenizer", {"terms": "ru"}, None), ("task3_tokenizer", {"terms": "found"}, None),
        (one, {"data": file}, "say what your prompts ask for"),
        (one, {"data": "o/n", "columns": "body"}, "COLUMNS='body'"),
        (one, {"data": file, "columns": "text=body"}, "row 1 has columns prompt, completion"),
        (one, {"data": "no.csv"}, "No such file"), (one, {"columns": "text=body"}, "needs DATA="),
        ("task2_encoder", {"data": file}, 'COLUMNS="anchor=prompt positive=completion"'),
        ("task3_tokenizer", {"terms": str(tmp_path / "terms.csv")}, "expected columns term, anchors"),
        ("task3_tokenizer", {"terms": "no.csv"}, "terms=no.csv: no such file"),
        (one, {"benchmark": "no.yaml"}, "BENCHMARK=no.yaml: no such file")]
    program = ("import json, sys\nfrom sources import data\nsaid = []\n"
               "for task, settings, _ in json.loads(sys.argv[1]):\n"
               "    try:\n        data.check(task, settings)\n        said.append(None)\n"
               "    except SystemExit as stop:\n        said.append(str(stop))\n"
               "print(json.dumps([said, [n for n in ('torch', 'transformers') if n in sys.modules]]))")
    done = subprocess.run([sys.executable, "-c", program, json.dumps(cases)], cwd=results.ROOT, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(results.ROOT)}, check=True)
    said, loaded = json.loads(done.stdout)  # and nothing else was printed
    assert not loaded
    for (*given, expected), line in zip(cases, said):
        assert (expected in line and "\n" not in line) if expected else line is None, (given, line)


def test_variables_of_the_makefile_become_knobs():
    script = results.ROOT / "task1_decoder" / "01_data.py"
    given = ["--data", "x.csv", "--columns", "prompt=q completion=a", "--benchmark", "mine.yaml"]
    settings = knobs.parse_arguments(given, script).settings
    assert settings == {"data": "x.csv", "columns": "prompt=q completion=a", "benchmark": "mine.yaml"}
    stored = results.ROOT / "results" / "mine" / "task1_decoder" / "01_data.json"
    command = results.command(stored, "", settings)
    assert command == "make task1 DATA=x.csv COLUMNS='prompt=q completion=a' BENCHMARK=mine.yaml"
    other = knobs.parse_arguments(given, results.ROOT / "task2_encoder" / "01_data.py").settings
    assert other == {"data": "x.csv", "columns": "prompt=q completion=a"}  # a benchmark is task 1's
