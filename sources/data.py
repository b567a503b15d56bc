"""The reader of own data (DATA=): a file, a folder of texts or a data set of a hub, checked row by row.

It stands apart from the corpus, and tasks 1 and 2 import it where they need it, so that a change here makes
only their results on own data stale; 01 of task 3 reads its list of terms here, and always depends on it.
pandas, pyarrow or datasets are loaded when a file of theirs is read, and nothing larger: `check` answers a
user's mistakes before the slow imports of a step.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from pathlib import Path

from sources import hub

# The sets of columns that a task accepts; the first one that the data has is read.
FORMS = {
    "task1_decoder": (("prompt", "completion"), ("messages",), ("text",)),
    "task2_encoder": (("anchor", "positive"),),
    "task3_tokenizer": (("text", "split"), ("text",), ("completion",), ("positive",)),
}
TERMS = ("term", "anchors", "negative_anchors")  # others, like a definition, are for people
MOST_CHARACTERS = 1_000_000  # of a text: a longer one is a broken file
MOST_BYTES = 2 << 30  # of a Parquet file when unpacked


def read_table(source: str, alternatives: tuple[tuple[str, ...], ...], minimum: int,
               sizes: str = "n_test=.. n_dev=..", columns: str = "") -> list[dict]:
    """All rows of a file, a folder or a data set on a hub.

    `alternatives` are the accepted sets of columns; the first one that the data has is returned, each cell a
    non-empty string; `columns` says which column of the data is which of ours (see `mapping`). Rows of chat
    messages come as `chat` returns them. SystemExit with file and row if something is wrong, or if there are
    fewer than `minimum` rows; `sizes` are the knobs that lower it.
    """
    renamed, form, table = mapping(columns), (), []
    try:
        for number, row in enumerate(rows_of(source), 1):
            form = form or form_of(list(row), renamed, alternatives)
            texts = {column: row.get(renamed.get(column, column)) for column in form}
            try:
                table.append(chat(texts["messages"]) if "messages" in form else check_texts(texts))
            except ValueError as err:
                name = row.get("name") or ""  # a file's of a folder, or what the data call so
                raise ValueError(f"row {number} {name!s:.80}".rstrip() + f": {err}") from None
        if not table:
            raise ValueError("no rows")
        if len(table) < minimum:
            remedy = f"add rows, or set {sizes} lower" if sizes else "add rows"
            raise ValueError(f"{len(table)} rows, the splits need at least {minimum}: {remedy}")
    except (ValueError, OSError, RuntimeError, OverflowError) as err:
        said = " ".join(str(getattr(err, "strerror", None) or err).split())[:500]
        expected = " or ".join("+".join(form) for form in alternatives)
        raise SystemExit(f"DATA={' '.join(source.split())}: {said}; expected columns {expected}") from None
    return table


def check(task: str, settings: dict[str, str]) -> None:
    """Refuse wrong data, columns, terms or benchmark before slow imports, with the lines of their readers.

    Local data are read whole, which takes a second for 100 MB; of a hub only the columns' form is checked.
    """
    source, columns = settings.get("data", "corpus"), settings.get("columns", "")
    if mapping(columns) and source == "corpus":
        raise SystemExit(f"COLUMNS={columns!r} needs DATA=: it names the columns of own data")
    if source != "corpus" and not hub.is_id(hub.data_set(source)[0]):
        with contextlib.redirect_stdout(None):  # the step itself says how it reads a file
            row = read_table(source, FORMS[task], 1, columns=columns)[0]
        if task == "task1_decoder" and "instruction" not in settings:
            check_instruction(source, row)
    if path := terms_file(settings.get("terms", "found")):
        read_terms(path)
    benchmark = settings.get("benchmark")
    if benchmark and not Path(benchmark).expanduser().is_file():
        raise SystemExit(f"BENCHMARK={benchmark}: no such file; expected a task definition of lm-eval (YAML)")


def check_instruction(source: str, row: dict) -> None:
    """SystemExit for a prompt that stands alone: no chat, and no text to be continued."""
    if "completion" in row and "turns" not in row:
        raise SystemExit(f"DATA={source}: say what your prompts ask for, SET=\"'instruction=...'\" "
                         "(SET=instruction= for nothing)")


# ---------------------------------------------------------------------------------------- columns and cells

def mapping(columns: str) -> dict[str, str]:
    """{ours: yours} of COLUMNS="prompt=question completion=answer". SystemExit for another form."""
    try:
        return dict(word.split("=", 1) for word in shlex.split(columns))
    except ValueError:  # a word without "=", a quotation that is not closed
        raise SystemExit(f"COLUMNS={columns!r}: expected ours=yours for columns with other names, as in "
                         "COLUMNS=\"prompt=question completion='the answer'\"") from None


def form_of(names: list[str], renamed: dict[str, str], alternatives: tuple) -> tuple[str, ...]:
    """The first set of columns that data with these `names` has. ValueError with a COLUMNS= that may fit."""
    for form in alternatives:
        if set(renamed) <= set(form) and {renamed.get(column, column) for column in form} <= set(names):
            return form
    lacking = [column for column in alternatives[0] if column not in names]
    others = [shlex.quote(name) for name in names if name not in alternatives[0]]
    guess = " ".join(map("=".join, zip(lacking, others[:1] + others[-1:])))
    raise ValueError(f"row 1 has columns {', '.join(names)}; say which is which, perhaps COLUMNS=\"{guess}\"")


def check_texts(texts: dict) -> dict:
    """The same, if all are texts that UTF-8 can store, of a size that a person can mean; else ValueError."""
    for name, text in texts.items():
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name!r} is {text!r}, not a text")
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"{name!r} has {len(text):,} characters, at most {MOST_CHARACTERS:,} are read")
        if "\0" in text:
            raise ValueError(f"{name!r} has a NUL character")
        text.encode()  # UnicodeEncodeError, a ValueError, for half a surrogate pair
    return texts


def chat(messages) -> dict:
    """{"prompt", "completion", "turns", "instruction"} of a list of {"role", "content"} or its JSON text.

    The last message is the completion, the last question the prompt; `turns` are the (question, answer) pairs
    before them, and `instruction` is the system message at the head, or "". ValueError for other roles or
    another order, tool calls, and contents that are not texts.
    """
    messages = json.loads(messages) if isinstance(messages, str) else messages
    try:
        roles = ["tool call" if message.get("tool_calls") else message["role"] for message in messages]
        texts = [message["content"] for message in messages]
    except (TypeError, KeyError, AttributeError):
        raise ValueError("'messages' is no list of {role, content}") from None
    start = int(roles[:1] == ["system"])
    pairs = list(zip(texts[start::2], texts[start + 1::2]))
    if not pairs or roles[start:] != ["user", "assistant"] * len(pairs):
        raise ValueError(f"'messages' have roles {roles}; expected user and assistant in turn, the assistant "
                         "last, and before them at most a system message")
    check_texts({f"message {number}": text for number, text in enumerate(texts, 1)})
    *turns, (prompt, completion) = pairs
    return {"prompt": prompt, "completion": completion, "turns": turns, "instruction": "".join(texts[:start])}


# -------------------------------------------------------------------------------------------------- formats

def rows_of(source: str):
    """The rows as they are stored. ValueError, OSError or RecursionError if they cannot be read."""
    path = Path(source).expanduser()
    if reader := read_folder if path.is_dir() else READERS.get(path.suffix):
        return reader(path)
    if hub.is_id(hub.data_set(source)[0]):
        return read_hub(source)
    raise ValueError(f"not 'corpus', a {', '.join(READERS)} file, a folder of .txt or .md files, or a hub id "
                     "owner/name[:configuration[:split]][@revision]")


def read_folder(folder: Path):
    """A row {"text", "name"} for each text of the .txt and .md files inside; a blank line ends one."""
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".txt", ".md"):
            for text in re.split(r"\n\s*\n", text_of(file).strip()):
                yield {"text": text, "name": file.relative_to(folder).as_posix()}


def read_json(path: Path):
    """The objects of a .json file, which is a list, or of the lines of a .jsonl file."""
    text = text_of(path)  # splitlines would split inside texts
    for number, part in enumerate(text.split("\n") if path.suffix == ".jsonl" else [text], 1):
        if part.strip():
            try:
                found = json.loads(part)
                yield from [{**row} for row in (found if isinstance(found, list) else [found])]
            except (ValueError, TypeError, RecursionError) as err:  # TypeError: JSON, but no object
                raise ValueError(f"line {number}: not a JSON object ({err})") from None


def read_csv(path: Path) -> list[dict]:
    """Rows of a table with comma, semicolon or tab between cells: its header says which."""
    import pandas
    text = text_of(path)
    separator = max(",;\t", key=re.split("[\r\n]", text, maxsplit=1)[0].count)
    if separator != ",":
        print(f"{path.name}: cells are separated by {separator!r}")
    table = pandas.read_csv(io.StringIO(text, newline=""), sep=separator, dtype=str, na_filter=False)
    if not isinstance(table.index, pandas.RangeIndex):  # pandas takes the first cells for names of rows
        raise ValueError(f"row 1 has more cells than columns: put cells that have {separator!r} in quotes")
    return table.to_dict("records")


def read_parquet(path: Path):
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        size = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
        if size > MOST_BYTES:
            raise ValueError(f"{size:,} bytes unpacked, at most {MOST_BYTES:,} are read: take fewer rows")
        for batch in file.iter_batches(100):  # few: in a dictionary a huge text counts once
            yield from batch.to_pylist()
    except pyarrow.ArrowException as err:
        raise ValueError(err) from None


READERS = {".jsonl": read_json, ".json": read_json, ".csv": read_csv, ".tsv": read_csv,
           ".parquet": read_parquet}


def text_of(path: Path) -> str:
    """The text of a file, without a byte-order mark. ValueError with the line if it is not UTF-8."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise ValueError(f"{path.name}, line {line}: not UTF-8 (byte 0x{data[err.start]:02x}), save it as "
                         "UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path.name} has a NUL character")
    return text


def read_hub(source: str):
    """A split of a data set of the hub. ValueError with the splits or configurations there are."""
    import datasets
    repository, configuration, split = hub.data_set(source)
    folder, commit = hub.fetch(repository, "dataset", "DATA=corpus or a local file")
    try:
        return datasets.load_dataset(str(folder), configuration, split=split)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as err:
        # no such split, several configurations, a damaged file
        raise ValueError(f"commit {commit[:12]} has no usable split {split!r}: {err.__cause__ or err}; give "
                         "the part you want, DATA=owner/name[:configuration[:split]]") from None


# -------------------------------------------------------------------------------------------- list of terms

def terms_file(terms: str) -> Path | None:
    """The CSV file of the knob `terms`; None if terms are to be found. SystemExit if it is missing."""
    if terms == "found":
        return None
    path = Path(__file__).parent.parent / "task3_tokenizer" / {"ru": "terms_ru.csv"}.get(terms, terms)
    path = path if path.is_file() else Path(terms).expanduser()
    if not path.is_file():
        raise SystemExit(f"terms={terms}: no such file; a CSV with columns {','.join(TERMS)}, or terms=found "
                         "or terms=ru")
    return path


def read_terms(path: Path) -> list[dict]:
    """The rows of a list of terms. SystemExit in one line if it is no table, empty or lacks a column."""
    expected = f"expected columns {', '.join(TERMS)} and a line for each term"
    try:
        rows = read_csv(path)
    except ValueError as err:
        raise SystemExit(f"{path.name}: {str(err).strip()}; {expected}") from None
    if not rows or not set(TERMS) <= set(rows[0]):
        raise SystemExit(f"{path.name}: {expected}")
    return rows
