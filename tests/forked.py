"""Run a script in a process forked from one that has the large libraries loaded: their import is most of
what a small step costs.

Only the standard library is imported here, so that the script finds the modules of its own repository copy
and no other.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

LIBRARIES = [
    "torch",
    "transformers",
    "peft",
    "datasets",
    "lm_eval.models.huggingface",
    "sentence_transformers",
    "rouge_score.rouge_scorer",  # 04 of task 1 imports it late, when a memory limit is in force
    "scipy.stats",
    "sklearn",
]


def child(root: str, script: str, arguments: list[str], out: str, prepare) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2)
    )
    os.chdir(root)
    sys.path.insert(0, root)
    sys.argv = [script, *arguments]
    assert "pipeline" not in sys.modules  # it would be this repository's, not the one of `root`
    finish = prepare() if prepare else None
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        if finish:
            finish()


def start(root: Path, script: str, arguments: list[str], out: str, prepare=None):
    """The started process, which writes to `out`/out and `out`/err; it calls `prepare` before the script, and
    what that returned after it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    for name in ("out", "err"):  # a busy machine starts the process late
        (Path(out) / name).touch()
    process = context.Process(target=child, args=(str(root), script, arguments, out, prepare))
    process.start()
    return process


def run(root: Path, script: str, arguments: list[str], timeout: float,
        prepare=None) -> subprocess.CompletedProcess:
    """What subprocess.run(..., capture_output=True, text=True) would return for `python script arguments`
    in `root`.
    """
    with tempfile.TemporaryDirectory() as out:
        process = start(root, script, arguments, out, prepare)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(script, timeout)
        return subprocess.CompletedProcess([script, *arguments], process.exitcode, *said(out))


def said(out: str) -> list[str]:
    """What the process has written to its two streams so far."""
    files = [Path(out) / name for name in ("out", "err")]
    return [file.read_text(encoding="utf-8") if file.exists() else "" for file in files]
