"""Faults while a step works: killed, interrupted, no space, no memory, no right to write, another process in
the same folder, a wrong clock. Afterwards the same command ends with what an undisturbed run leaves.

The steps are small (see small.py), in processes forked with the libraries loaded. `make faults` runs all,
`make test` the quick ones.
"""

import contextlib
import json
import operator
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from common import models
from pipeline import results, runner
from tests import breakage, cuda_memory, forked, small
from tests.conftest import SHARED, environment, one_line

ALL = [(task, step) for task in small.TASKS for step in small.STEPS]


def no_debris(root: Path) -> None:
    for pattern in (".*.part", "*.partial", "*tmp*"):
        assert not [*(root / "runs").glob(f"[!a]*/**/{pattern}"), *(root / "results").rglob(pattern)]


# -------------------------------------------------------------------------------------------------- SIGKILL


def moments(task: str, step: str, whole: small.Outcome, n: int = 20) -> list[tuple[str, float, float]]:
    """n seeded moments to kill a step, as (kind, number or seconds, delay): right before one of its
    operations on files, among them the last ones; some milliseconds after one; and after some time.
    """
    rng, last = random.Random(f"{task} {step}"), len(whole.operations)
    before = sorted({last, max(1, last - 1), *rng.sample(range(1, last + 1), min(last, n // 2 - 2))})
    chosen = [("before", number, 0.0) for number in before[:n // 2]]
    after = sorted(rng.choices(range(1, last + 1), k=n // 4))
    chosen += [("after", number, round(rng.uniform(0.0005, 0.03), 4)) for number in after]
    return chosen + [("time", round(rng.uniform(0.05, 0.95) * whole.seconds, 2), 0.0)
                     for _ in range(n - len(chosen))]


def kill(steps: small.Steps, step: str, kind: str, at: float, delay: float) -> bool:
    """Start the step and kill it at that moment; False if it had ended by then."""
    with tempfile.TemporaryDirectory() as out:
        log = Path(out) / "log"
        last = int(at) if kind == "before" else 0
        process = steps.start(step, out, partial(breakage.count_operations, str(log), str(steps.root), last))
        if kind == "after":
            while process.is_alive() and not (log.exists() and log.read_bytes().count(b"\n") >= at):
                time.sleep(0.0005)
        if kind != "before":
            process.join(delay if kind == "after" else at)
            process.kill()
        process.join(300)
        return process.exitcode == -signal.SIGKILL


def killed_and_repeated(steps: small.Steps, step: str, kind: str, at: float, delay: float, record) -> None:
    whole = steps.reach(step)
    steps.restore(step)
    while not kill(steps, step, kind, at, delay):  # slower or faster than when it was measured
        kind, at = ("time", whole.seconds) if kind != "time" else (kind, at)
        at, delay = at * 0.8, 0.0
        steps.restore(step)
    what = {"before": f"before operation {at} of {len(whole.operations)}, "
                      f"{whole.operations[min(int(at), len(whole.operations)) - 1]}",
            "after": f"{1000 * delay:.1f} ms after operation {at} of {len(whole.operations)}",
            "time": f"after {at:.2f} of {whole.seconds:.2f} s"}[kind]
    stored = steps.result(step).exists()
    if stored:  # make would not repeat the step, so all has to be there
        rows = json.loads(steps.result(step).read_text())["rows"]
        rows = [row for row in rows if not small.MEASURED.search(row.get("metric", ""))]
        assert rows == whole.left["rows"], what
        for name, digest in json.loads(steps.result(step).read_text())["artifacts"].items():
            assert results.sha256(steps.places["runs"] / name) == digest, f"{what}: {name}"
    steps.finish(step)
    steps.check(step, what)
    no_debris(steps.root)
    record("faults", fault="killed", task=steps.task, step=step, moment=what, result_was_stored=stored,
           result="ok")


@pytest.mark.faults
@pytest.mark.parametrize(("task", "step"), ALL)
def test_a_step_killed_at_any_moment_ends_as_if_it_had_not_been(task, step, steps, record):
    own = steps(task)
    for kind, at, delay in moments(task, step, own.reach(step)):
        killed_and_repeated(own, step, kind, at, delay, record)


@pytest.mark.parametrize("index", [pytest.param(4, marks=pytest.mark.all), 14])
def test_a_killed_training_ends_as_if_it_had_not_been(index, steps, record):
    own = steps("task1_decoder")
    moment = moments("task1_decoder", "03_train", own.reach("03_train"))[index]
    killed_and_repeated(own, "03_train", *moment, record)


UNPACK = """
import sys
from sources import pretrained
print(pretrained.written_once("wide", lambda folder: pretrained.hyperclone(sys.argv[1], folder, times=2)))
"""


@pytest.mark.faults
def test_killed_while_weights_are_unpacked(tmp_path, repo, quick, tiny_model_folder, record):
    """What half the files were written of is made again, under the name that others wait for."""
    root = tmp_path / "repo"
    for folder in SHARED:
        shutil.copytree(quick / folder, root / folder)
    (root / "unpack.py").write_text(UNPACK)
    target, log = root / "runs" / "assets" / "wide", tmp_path / "log"
    count, arguments = partial(breakage.count_operations, str(log), str(root)), [str(tiny_model_folder)]
    started = time.perf_counter()
    assert forked.run(root, "unpack.py", arguments, 100, count).returncode == 0
    seconds, operations = time.perf_counter() - started, log.read_text().splitlines()
    whole, rng = results.sha256(target), random.Random(0)
    at = [("before", number) for number in range(1, len(operations) + 1)][:10]
    at += [("time", rng.uniform(0.05, 0.95) * seconds) for _ in range(20 - len(at))]
    for kind, moment in at:
        shutil.rmtree(root / "runs")
        process = forked.start(root, "unpack.py", arguments, str(tmp_path),
                               partial(count, moment) if kind == "before" else count)
        process.join(None if kind == "before" else moment)
        process.kill()
        process.join()
        assert not target.exists() or results.sha256(target) == whole
        assert forked.run(root, "unpack.py", arguments, 100).returncode == 0
        assert results.sha256(target) == whole
        assert sorted(file.name for file in target.parent.iterdir()) == [".wide.lock", "wide"]
        record("faults", fault="killed", task="weights", step="unpacked", moment=f"{kind} {moment:.4g}",
               result="ok")


# ------------------------------------------------------------------------------------------------ interrupts


@pytest.mark.faults
@pytest.mark.parametrize(("task", "step"), ALL)
def test_an_interrupted_step_says_one_line_and_goes_on(task, step, steps, record):
    own, rng = steps(task), random.Random(f"{task} {step}")
    whole = own.reach(step)
    for share in (rng.uniform(0.2, 0.5), rng.uniform(0.5, 0.9)):
        own.restore(step)
        with tempfile.TemporaryDirectory() as out:
            process = own.start(step, out, breakage.default_interrupt)
            deadline = time.perf_counter() + share * whole.seconds
            while process.is_alive() and (time.perf_counter() < deadline
                                          or "run=" not in forked.said(out)[0]):
                time.sleep(0.005)
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.kill(process.pid, signal.SIGINT)
            process.join(60)
            text = forked.said(out)[1]
        if process.exitcode != 0:
            assert "Traceback" not in text and "interrupted" in text.strip().splitlines()[-1], text
        own.finish(step)
        own.check(step, f"interrupted after {share:.2f}")
        record("faults", fault="Ctrl-C", task=task, step=step, moment=f"after {share:.2f} of the time",
               result="ok")


def test_an_interrupt_during_the_imports_is_one_line(quick, record):
    """The libraries take seconds to import, and that is when people see their mistake."""
    process = subprocess.Popen(
        [sys.executable, "task2_encoder/03_train.py", "--profile", "smoke", "--run", "never"], cwd=quick,
        env=environment(quick), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=breakage.default_interrupt)
    while "torch" not in Path(f"/proc/{process.pid}/maps").read_text():  # the first of the large ones
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0 and "Traceback" not in said and "interrupted" in said, said[-800:]
    record("faults", fault="Ctrl-C", task="task2_encoder", step="03_train", moment="during the imports",
           result="ok")


# --------------------------------------------------------------------------------- disk, rights, memory, time


def possible(prepare) -> str | None:
    """Why this machine cannot do what `prepare` does to a process, or None."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("runs", "results"):
            (Path(folder) / name).mkdir()
        (Path(folder) / "nothing.py").write_text("")
        done = forked.run(folder, "nothing.py", [], 60, partial(prepare, folder))
        return done.stderr.strip().splitlines()[-1] if done.returncode else None


def blocks(folder: Path) -> int:
    """Bytes that the files of a folder need on a disk of 4 KiB blocks."""
    return sum(-(-file.lstat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


@pytest.mark.faults
@pytest.mark.parametrize(("task", "step"), ALL)
def test_a_full_disk_is_one_line_and_with_space_the_step_ends(task, step, steps, record):
    own = steps(task)
    own.reach(step)
    if reason := possible(partial(breakage.small_disk, size=1 << 20)):
        record("faults", fault="disk full", task=task, step=step, result=f"not tried: {reason}")
        pytest.skip(reason)
    for name in ("runs", "results"):  # other tasks' runs would be copied to the small disk too
        for other in (own.root / name / small.RUN).iterdir():
            if other.name != task:
                shutil.rmtree(other)
    after = sum(blocks(own.kept / f"after {step}" / place) for place in own.places)
    own.restore(step)
    before = sum(blocks(own.root / name) for name in own.places) + 8192
    full = 0
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        own.restore(step)
        size = before + int(share * (after - before))
        done = own.run(step, partial(breakage.small_disk, str(own.root), size=size))
        if done.returncode == 0:
            continue
        full += 1
        one_line(done, "No space left on device", "free some space")
        for name, folder in own.places.items():  # what the full disk held
            shutil.rmtree(folder, ignore_errors=True)
            if (left := own.root / "left" / name / small.RUN / task).exists():
                shutil.copytree(left, folder)
        own.finish(step)
        own.check(step, f"disk of {size} bytes")
        no_debris(own.root)
        record("faults", fault="disk full", task=task, step=step, moment=f"{size - before:,} bytes free",
               result="ok")
    assert full, "no disk was too small"


@pytest.mark.parametrize(("task", "step"), [
    pytest.param(task, step, marks=[] if (task, step) == ("task1_decoder", "01_data") else pytest.mark.faults)
    for task, step in ALL])
def test_runs_that_cannot_be_written_are_one_line(task, step, steps, record):
    own = steps(task)
    own.reach(step)
    if reason := possible(breakage.read_only):
        record("faults", fault="read-only runs/", task=task, step=step, result=f"not tried: {reason}")
        pytest.skip(reason)
    own.restore(step)
    one_line(own.run(step, partial(breakage.read_only, str(own.root))), "Read-only file system",
             "make it writable")
    own.finish(step)
    own.check(step, "after a read-only runs/")
    record("faults", fault="read-only runs/", task=task, step=step, result="ok")


def nearly(now, whole) -> bool:
    """Equal but for rounding: short of memory oneDNN takes bf16 kernels that round otherwise, without a word,
    and a stage that ended so is kept.
    """
    if isinstance(now, dict) and isinstance(whole, dict):
        return now.keys() == whole.keys() and all(
            now[key] == (pytest.approx(value, rel=1e-2, abs=1e-2) if isinstance(value, float) else value)
            for key, value in whole.items())
    return now[0] == whole[0] if isinstance(now, tuple) and isinstance(whole, tuple) else now == whole


@pytest.mark.faults
@pytest.mark.parametrize(("task", "step"), [(task, step) for task, step in ALL if step != "01_data"])
def test_too_little_memory_is_one_line_that_names_the_knobs(task, step, steps, record):
    own, refused, bf16 = steps(task), 0, models.compute_name() == "bf16"
    own.reach(step)
    # MiB; with less the interpreter itself or the C library fails, in odd ways
    least = {"task1_decoder": 12, "task2_encoder": 96, "task3_tokenizer": 64}[task]
    for more in (least << (20 + doubled) for doubled in range(5)):
        own.restore(step)
        done = own.run(step, partial(breakage.limit_memory, more))
        if done.returncode == 0:
            break
        # a library that aborts the process has said so itself, the C library with an exit code of its own
        if done.returncode > 0 and "ABORT" not in done.stderr:
            one_line(done, "eval_batch_size", "MODEL=")
        assert "Traceback" not in done.stderr, done.stderr[-1500:]
        refused += 1
        own.finish(step)
        own.check(step, f"after {more >> 20} MiB were not enough", nearly if bf16 else operator.eq)
        record("faults", fault="too little memory", task=task, step=step, moment=f"{more >> 20} MiB more",
               exit=done.returncode, result="ok")
    if not refused:
        record("faults", fault="too little memory", task=task, step=step, moment=f"{least} MiB more",
               result="not tried: the small step needs less beside the libraries")


@pytest.mark.faults
@pytest.mark.parametrize(("task", "step"), ALL)
def test_a_wrong_clock_and_scrambled_file_times_change_nothing(task, step, steps, record):
    own, years = steps(task), 10 * 365 * 86400
    own.reach(step)
    for name, clock in {"ten years slow": (-years, 0, 0), "jumps back a day": (0, 3, -86400.0),
                        "jumps ahead ten years": (0, 3, years)}.items():
        own.restore(step)
        scramble(own)
        own.finish(step, partial(breakage.wrong_clock, *clock))
        own.check(step, name)
        assert json.loads(own.result(step).read_text())["cost"]["seconds"] >= 0
        record("faults", fault="clock and file times", task=task, step=step, moment=name, result="ok")
    scramble(own)
    for done in small.STEPS[:small.STEPS.index(step) + 1]:
        said = subprocess.run([sys.executable, "-m", "pipeline.fresh", own.result(done),
                               *own.arguments], cwd=own.root, env=environment(own.root), check=False,
                              capture_output=True, text=True)
        assert said.returncode == 0, said.stdout + said.stderr  # nothing runs again


def scramble(own: small.Steps) -> None:
    rng = random.Random(0)
    for folder in (*own.places.values(), own.root / own.task, *(own.root / name for name in SHARED)):
        for file in folder.rglob("*") if folder.exists() else ():
            os.utime(file, (rng.uniform(0, 4e9),) * 2)


# -------------------------------------------------------------------------------------- two in one folder


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_undisturbed(steps, record):
    own = steps("task1_decoder")
    own.reach("03_train")
    own.restore("03_train")
    with tempfile.TemporaryDirectory() as out:
        first = own.start("03_train", out)
        while "step=" not in forked.said(out)[0]:
            assert first.is_alive(), forked.said(out)[1]
            time.sleep(0.01)
        os.kill(first.pid, signal.SIGSTOP)  # until the second has been answered
        try:
            for step in ("03_train", "01_data"):
                one_line(own.run(step), f"process {first.pid}", "03_train", "RUN=")
        finally:
            os.kill(first.pid, signal.SIGCONT)
        first.join(120)
    assert first.exitcode == 0
    own.check("03_train", "with another process in its folder")
    record("faults", fault="two runs in one folder", task="task1_decoder", step="03_train", result="ok")


def test_a_result_edited_by_hand_is_found(steps, record):
    """By `make check`, and by the next step."""
    own = steps("task1_decoder")
    own.reach("03_train")
    own.restore("04_eval")
    path = own.result("03_train")
    result = json.loads(path.read_text())
    result["rows"][0]["value"] += 1
    path.write_text(json.dumps(result))
    one_line(own.run("04_eval"), "03_train.json", "edited")
    shutil.copytree(results.ROOT / "report", own.root / "report", dirs_exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "report.render", "check"], cwd=own.root, check=False,
                          env=environment(own.root), capture_output=True, text=True)
    assert done.returncode != 0 and "03_train.json" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr[-800:]
    record("faults", fault="result edited by hand", task="task1_decoder", step="03_train", result="ok")


# ------------------------------------------------------------------------------------------------------ GPU


@pytest.mark.parametrize("error", [
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB. See the docs",
    "[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: tried to allocate 9.",
    "Unable to allocate 8.00 GiB for an array with shape (1, 1)", "Cannot allocate memory (os error 12)",
    "std::bad_alloc"])
def test_a_lack_of_memory_names_the_knobs(error, monkeypatch, tmp_path, record):
    """As PyTorch on a GPU and on a CPU, numpy, safetensors and C++ say it."""
    from task1_decoder import task

    def main(run):
        raise RuntimeError(error) if "CUDA" not in error else models.torch.OutOfMemoryError(error)

    monkeypatch.setattr(results, "ROOT", tmp_path)
    main.__module__ = "task1_decoder.task"
    monkeypatch.setattr(sys, "argv", ["task.py", "--run", "memory"])
    monkeypatch.setitem(runner.FACTS, "predicted_GiB", 3.21)
    with pytest.raises(SystemExit) as refused:
        runner.start(main, task.Config, task.PROFILES)
    said = str(refused.value)
    assert "\n" not in said and "eval_batch_size" in said and "MODEL=" in said
    assert "3.2 GiB were predicted" in said
    assert "allocate" in said or "bad_alloc" in said
    record("faults", fault="too little memory", task="any", step="any", moment=error[:40], result="ok")


@pytest.mark.faults
def test_too_little_memory_of_a_gpu_is_one_line_that_names_the_knobs(record):
    if not torch.cuda.is_available():
        record("faults", fault="CUDA out of memory", task="task1_decoder", step="any",
               result="not tried: no GPU; python -m tests.cuda_memory on one")
        pytest.skip("no GPU")
    rows = [cuda_memory.tried(*case) for case in cuda_memory.CASES]
    for row in rows:
        record(**row)
    assert {row["result"] for row in rows} == {"ok"}
