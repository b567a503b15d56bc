"""Result files: one JSON per step, what it is called, and the content hashes that say what it was made from.

A result names everything behind it by its hash: modules of the repository (without comments and docstrings),
earlier results, files, hub commits. Neither numpy nor torch is loaded here, so `make` asks in a fraction of a
second whether results are current.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# these change no number, and neither does pipeline/, of which no module is hashed
PLUMBING = {"sources/hub.py", "sources/__init__.py", "common/__init__.py"}
REFERENCE = ("cpu", "again", "gpu", "ru")  # runs of this repository
SOURCES = ("model", "data", "columns", "benchmark", "terms")  # knobs that are variables of the Makefile


# ---------------------------------------------------------------------------------------------------- files

def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.part"):  # by a process that was killed
        left.unlink(missing_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_rows(path: Path, rows: list[dict]) -> None:
    """A JSON-lines file of objects."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON-lines file, in order."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def sealed(result: dict) -> str:
    """The text of a result file, with a checksum of all that is in it.

    It is there against slips and stale copies, not against forgers, who could compute it as well.
    """
    result = json.loads(json.dumps(result | {"checksum": None}, allow_nan=False))  # keys become text
    return json.dumps(result | {"checksum": digest(result)}, indent=1, ensure_ascii=False) + "\n"


def read(path: Path, remedy: str = "") -> dict:
    """A stored result. SystemExit with the command that makes it (`remedy`) if it is missing, or not what the
    step wrote to this path: cut short, edited, or copied from elsewhere.
    """
    remedy = remedy or command(path, "", {})
    if not path.exists():
        raise SystemExit(f"{shown(path)} is missing: {remedy}")
    run, task = path.parts[-3:-1]
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        whole = result | {"run": run, "task": task, "step": path.stem, "checksum": None}
    except (ValueError, TypeError, RecursionError) as err:
        raise SystemExit(f"{shown(path)} is cut short or no JSON ({err}): delete it, then {remedy}") from None
    if whole != result | {"checksum": None} or digest(whole) != result.get("checksum"):
        raise SystemExit(f"{shown(path)} was edited or copied from another run (its checksum is wrong or "
                         f"missing): restore it, or delete it, then {remedy}")
    return result


def cached(path: Path, given: list, make) -> dict:
    """What `make()` returned, kept at `path` as long as `given` (knobs, data) and the code are the same."""
    identity = digest([given, imported_modules()])
    if path.exists() and json.loads(path.read_text())["identity"] == identity:
        print(f"{shown(path)}: as an earlier start left it", flush=True)
    else:
        write_atomic(path, json.dumps({"identity": identity, **make()}))
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------------- names

def shown(path: Path | str) -> str:
    """A path as people should read it: relative to the repository where possible."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def visible(text: str) -> str:
    """Text with a code like \\u202e for each character that cannot be seen and may change what others look
    like: controls (of terminals too), bidirectional and zero-width ones. Line feeds, tabs and the usual
    blanks stay.
    """
    kept = "\n\t\u00a0\u202f\u3000"
    return "".join(c if c.isprintable() or c in kept else f"\\u{ord(c):04x}" for c in text)


def public(text: str) -> str:
    """A source (model, data, terms, benchmark) as anything saved may name it.

    A path inside the repository is relative to it, and of one outside only the last part remains.
    """
    path = Path(os.path.abspath(Path(text).expanduser()))
    if not (text and path.exists()):  # a name, or an id of a hub
        return text
    return shown(path) if path.is_relative_to(ROOT) else path.name


def stored(values: dict) -> dict:
    """Knobs or settings as results keep them: their sources are `public`."""
    return {name: public(value) if name in SOURCES else value for name, value in values.items()}


def default_run(profile: str) -> str:
    """The folder of results of who names none; the reference runs are made under names of their own."""
    return "smoke" if profile == "smoke" else "mine"


def command(path: Path, profile: str, settings: dict[str, str]) -> str:
    """The make command that builds results/<run>/<task>/<step>.json with these arguments."""
    run, task, step = path.parts[-3:]
    profile = profile or (run if run in ("smoke", "gpu") else "cpu")
    words = ["make", "ablations" if step == "ablations.json" else task.split("_")[0]]
    words += [f"PROFILE={profile}"] if profile != "cpu" else []
    words += [f"RUN={run}"] if run != default_run(profile) else []
    sources = [name for name in SOURCES if name in settings]
    words += [f"{name.upper()}={shlex.quote(settings[name])}" for name in sources]
    knobs = [shlex.quote(f"{name}={settings[name]}") for name in settings if name not in sources]
    return " ".join(words + ([f'SET="{" ".join(knobs)}"'] if knobs else []))


# --------------------------------------------------------------------------------------------------- hashes

def digest(value) -> str:
    """Short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def sha256(path: Path, whole: int = 1 << 30) -> str:
    """Hash of a file, or of all files of a folder with their names, but for README.md: 04 writes the card of
    what 03 has hashed.

    Of a file of weights above `whole` bytes it reads the size and one MiB in sixteen (4 GB: 0.3 s instead of
    3): another training changes weights everywhere, and the first MiB has the names and shapes.
    """
    found = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name != "README.md")
    for file in files if path.is_dir() else [path]:
        found.update(file.relative_to(path).as_posix().encode() if path.is_dir() else b"")
        size, block = file.stat().st_size, 1 << 20
        sparse = file.suffix == ".safetensors" and size > whole
        found.update(str(size).encode() if sparse else b"")
        with file.open("rb") as stream:
            for start in range(0, size, 16 * block if sparse else block):
                stream.seek(start)
                found.update(stream.read(block))
    return found.hexdigest()


def canonical(node) -> str:
    """An AST as text that is equal on Python 3.10-3.13: ast.dump's optional fields differ between them."""
    if isinstance(node, ast.AST):
        fields = (f"{name}={canonical(value)}" for name, value in ast.iter_fields(node)
                  if value not in (None, []) and name not in ("kind", "type_comment", "ctx"))
        return f"{type(node).__name__}({','.join(fields)})"
    return f"[{','.join(map(canonical, node))}]" if isinstance(node, list) else repr(node)


def source_hash(path: Path) -> str:
    """Hash of a file or folder, for Python without comments and docstrings, which change no result."""
    if path.suffix != ".py":
        return sha256(path, whole=1 << 26)[:16]  # `make` asks for a model folder at every step: 0.05 s a GB
    return code_hash(path.read_text(encoding="utf-8"))


@functools.cache  # the results of a run name the same modules again and again
def code_hash(source: str) -> str:
    """The `source_hash` of Python code."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.AST(body=[ast.Expr(ast.Constant(str())), *rest]):
                node.body = rest
    return hashlib.sha256(canonical(tree).encode()).hexdigest()[:16]


def result_hash(result: dict) -> str:
    """Hash of what a later step can depend on: configuration, rows, artifacts. Not time, machine or memory.
    """
    return digest({key: result.get(key) for key in ("config", "rows", "artifacts")})


def imported_modules() -> dict[str, str]:
    """{path: source hash} of the modules of common/, sources/ and the tasks that this process has imported,
    without PLUMBING: those that can change a number.
    """
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    names = {shown(Path(file).resolve()) for file in files}
    return {name: source_hash(ROOT / name) for name in sorted(names - PLUMBING)
            if re.fullmatch(r"(common|sources|task\w+)/\w+\.py", name) and (ROOT / name).exists()}
