"""What the benches share: the seconds of a training's steps, a process for each measurement, and the result,
results/bench/<name>-<gpu|cpu|cpu-bf16>.json: a CPU with fast bf16 computes in it and is another case.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time

import torch
from transformers import TrainerCallback

from pipeline import results, runner

FOLDER = results.ROOT / "results" / "bench"
PACKAGES = ("trl", "liger-kernel", "triton")  # versions beside those of every result
WARM_UP = 3  # steps of a training that do not count: libraries choose kernels and allocate in them
RUN = 400  # steps of the training of PROFILE=gpu


def need(module: str, package: str) -> None:
    """SystemExit in one line if the peer is not installed."""
    if importlib.util.find_spec(module) is None:
        raise SystemExit(f"the peer {package} is not installed: python -m pip install {package}")


def has_gpu() -> bool:
    return torch.cuda.is_available()


class Clock(TrainerCallback):
    """When each step of a training ended, with the accelerator done, and the losses that were logged."""

    def on_train_begin(self, *args, **kwargs):
        self.marks, self.losses = [], []
        if has_gpu():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, *args, **kwargs):
        self.marks = self.marks or [time.perf_counter()]

    def on_step_end(self, *args, **kwargs):
        if has_gpu():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def values(self, what: str, counts: list[int], slow: set[int] = frozenset()) -> dict:
        """Figures of the training, in whose step i `counts[i]` of `what` were trained.

        Steps of the warm-up and those in `slow` are no part of the speed: `warm_up_seconds` is what all steps
        took beyond the time of as many others.
        """
        seconds = [end - start for start, end in zip(self.marks, self.marks[1:])]
        steady = [i for i in range(WARM_UP, len(seconds)) if i not in slow]
        if not steady:
            raise SystemExit(f"none of {len(seconds)} steps was without warm-up: take more --steps")
        step = statistics.mean(seconds[i] for i in steady)
        warm_up = max(0.0, sum(seconds) - len(seconds) * step)
        return {f"{what}_per_second": sum(counts[i] for i in steady) / sum(seconds[i] for i in steady),
                "peak_GiB": runner.peak_memory() / 2**30, "loss_first": self.losses[0],
                "loss_last_5": statistics.mean(self.losses[-5:]), "steps": len(seconds),
                "step_seconds": step, "warm_up_seconds": warm_up,
                f"seconds_of_{RUN}_steps": warm_up + RUN * step}


def arguments(doc: str, **defaults) -> argparse.Namespace:
    """The command line of a bench of trainings; --variant measures one in this process."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=defaults["model"])
    parser.add_argument("--rows", type=int, nargs="+", default=defaults["rows"], help="rows of a batch")
    parser.add_argument("--steps", type=int, default=defaults["steps"])
    parser.add_argument("--repeat", type=int, default=defaults["repeat"], help="the median counts")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    return parser.parse_args()


def each(script: str, variants: dict[str, bool], args, speed: str) -> list[dict]:
    """A row per number of rows and variant {name: is it a peer?}: the median by `speed` of `args.repeat`
    processes, or the last line of one that failed.

    Processes, because Liger replaces functions of a whole process, and memory has one peak in each.
    """
    table = []
    for rows in args.rows:
        done: dict[str, list[dict]] = {name: [] for name in variants}
        for turn in range(args.repeat):  # they take turns
            for name in variants:
                print(f"{name}, {rows} rows, {turn + 1} of {args.repeat}", flush=True)
                command = [sys.executable, script, "--variant", name, "--rows", str(rows),
                           "--model", args.model, "--steps", str(args.steps)]
                child = subprocess.run(command, capture_output=True, text=True, check=False)
                last = (child.stderr if child.returncode else child.stdout).strip().splitlines() or [""]
                done[name].append({"error": last[-1][:300]} if child.returncode else json.loads(last[-1]))
        for name, runs in done.items():
            good = sorted((run for run in runs if speed in run), key=lambda run: run[speed])
            table.append({"variant": name, "peer": variants[name], "rows": rows}
                         | (good[(len(good) - 1) // 2] if good else runs[0]))
    return table


def with_ratios(rows: list[dict], speed: str) -> list[dict]:
    """The rows with `ratio`: their speed over that of the best peer with as many rows, where there is one."""
    best: dict = {}
    for row in rows:
        if row["peer"] and speed in row:
            best[row.get("rows")] = max(row[speed], best.get(row.get("rows"), 0))
    return [row | {"ratio": row[speed] / best[row.get("rows")]} if speed in row and row.get("rows") in best
            else row for row in rows]


def write(name: str, settings: dict, rows: list[dict], speed: str) -> None:
    """Print the rows as a table and write them with their ratios, what they ran on and `settings`.

    Rows of an earlier call for the same settings, on the same day, machine and commit stay, so that a bench
    can be run in parts.
    """
    env = runner.environment()
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            env[package] = importlib.metadata.version(package)
    kind = "gpu" if has_gpu() else "cpu" if settings["compute"] == "fp32" else f"cpu-{settings['compute']}"
    path = FOLDER / f"{name}-{kind}.json"
    if path.exists():
        old, now = results.read(path, "repeat the bench"), {(row["variant"], row.get("rows")) for row in rows}
        if (old["settings"], old["env"]) == (settings, env):
            rows = [row for row in old["rows"] if (row["variant"], row.get("rows")) not in now] + rows
    rows = with_ratios(sorted(rows, key=lambda row: row.get("rows", 0)), speed)
    result = {"run": FOLDER.parent.name, "task": FOLDER.name, "step": path.stem, "settings": settings,
              "speed": speed, "rows": rows, "env": env}
    results.write_atomic(path, results.sealed(result))
    print("\n".join(lines(rows)) + f"\n{env['device']}; wrote {results.shown(path)}")


def lines(rows: list[dict]) -> list[str]:
    """A table as lines of text, its columns those of all rows."""
    def cell(value):
        if isinstance(value, float):
            return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
        if value is None or isinstance(value, bool):
            return "yes" if value else ""
        return str(value)
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(names))]
    return ["  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in table]
