"""Run a script in a process forked from one that has the large libraries loaded: their import is most of
what a small step costs.

Only the standard library is imported here, so that the script finds the `common` of its own repository copy
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
    "scipy.stats",
    "sklearn",
]


def child(root: str, script: str, arguments: list[str], out: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{out}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2)
    )
    os.chdir(root)
    sys.path.insert(0, root)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run(root: Path, script: str, arguments: list[str], timeout: float) -> subprocess.CompletedProcess:
    """What subprocess.run(..., capture_output=True, text=True) would return for `python script arguments`
    in `root`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    with tempfile.TemporaryDirectory() as out:
        process = context.Process(target=child, args=(str(root), script, arguments, out))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(script, timeout)
        said = [(Path(out) / name).read_text(encoding="utf-8") for name in ("out", "err")]
        return subprocess.CompletedProcess([script, *arguments], process.exitcode, *said)
