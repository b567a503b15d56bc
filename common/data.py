"""The reader of own data (DATA=): a JSONL, CSV or Parquet file or a data set of a hub, checked row by row.

It stands apart from the corpus, and scripts import it where they need it, so that a change here makes only
results on own data stale.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

from common import hub


def read_table(source: str, alternatives: tuple[tuple[str, ...], ...], minimum: int,
               sizes: str = "n_test=.. n_dev=..") -> list[dict]:
    """All rows of a file or of the split "train" of a data set on a hub.

    `alternatives` are the accepted sets of columns; the first one that the data has is returned, each cell a
    non-empty string. SystemExit with file and row if something is wrong, or if there are fewer than `minimum`
    rows; `sizes` are the knobs that lower it.
    """
    try:
        rows = rows_of(source)
        names = list(rows[0]) if rows else []
        columns = next((columns for columns in alternatives if set(columns) <= set(names)), None)
        if columns is None:
            raise ValueError(f"row 1 has columns {', '.join(map(str, names))}" if rows else "no rows")
        for number, row in enumerate(rows, 1):
            for column in columns:
                if not isinstance(row.get(column), str) or not row[column].strip():
                    raise ValueError(f"row {number}: {column!r} is {row.get(column)!r}, not a text")
        if len(rows) < minimum:
            remedy = f"add rows, or set {sizes} lower" if sizes else "add rows"
            raise ValueError(f"{len(rows)} rows, the splits need at least {minimum}: {remedy}")
    except (ValueError, OSError) as err:  # pyarrow's errors are among them
        said = " ".join(str(getattr(err, "strerror", None) or err).split())
        expected = " or ".join("+".join(columns) for columns in alternatives)
        raise SystemExit(f"DATA={source}: {said}; expected columns {expected}") from None
    return [{column: row[column] for column in columns} for row in rows]


def rows_of(source: str) -> list[dict]:
    """The rows as they are stored. ValueError or OSError if they cannot be read."""
    path = Path(source).expanduser()
    if path.suffix in READERS:
        return READERS[path.suffix](path)
    if hub.is_id(source):
        return read_hub(source)
    raise ValueError(f"not 'corpus', a {', '.join(READERS)} file or a hub id owner/name[@revision]")


def read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(text_of(path).split("\n"), 1):  # splitlines would split inside texts
        if line.strip():
            try:
                rows.append({**json.loads(line)})
            except (ValueError, TypeError) as err:  # TypeError: JSON, but no object
                raise ValueError(f"line {number}: not a JSON object ({err})") from None
    return rows


def read_csv(path: Path) -> list[dict]:
    csv.field_size_limit(1 << 30)  # its default is 131,072 characters
    rows = list(csv.DictReader(io.StringIO(text_of(path))))
    for number, row in enumerate(rows, 1):
        if None in row:  # the cells that have no column
            raise ValueError(f"row {number} has more cells than columns, {row[None]}: quote its commas")
    return rows


def read_parquet(path: Path) -> list[dict]:
    import pyarrow.parquet
    return pyarrow.parquet.read_table(path).to_pylist()


READERS = {".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}


def text_of(path: Path) -> str:
    """The text of a file, without a byte-order mark. ValueError with the line that is not UTF-8."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise ValueError(f"line {line}: not UTF-8 (byte 0x{data[err.start]:02x}), save it as UTF-8") from None


def read_hub(source: str) -> list[dict]:
    """The split "train" of a data set of the hub. ValueError if it has none that can be read."""
    import datasets
    folder, commit = hub.fetch(source, "dataset", "DATA=corpus or a local file")
    try:
        return datasets.load_dataset(str(folder), split="train").to_list()
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as err:
        # no such split, several configurations, a damaged file
        raise ValueError(f"commit {commit[:12]} has no usable split 'train': {err.__cause__ or err}; give "
                         "the part you want as a JSONL file") from None
