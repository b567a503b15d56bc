"""Running a step: what happens before its slow imports, around its `main`, and when it saves its result."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import importlib.metadata
import logging
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline import checks, knobs, results
from sources import hub

UPSTREAM: dict = {}  # what earlier steps chose by themselves, of those this process has loaded
FACTS: dict = {}  # what this process chose or predicted (number format, threads, GiB), for a result's `env`
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # under torchrun only the first process prints and writes
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "lm-eval",
            "sentence-transformers", "tokenizers", "numpy", "scipy", "scikit-learn")
LESS_MEMORY = "SET='eval_batch_size=.. rows_per_pass=..' lower, or a smaller MODEL="
# Words in an error of the system or of a library, and what a user can do about it.
REMEDIES = {os.strerror(errno.ENOSPC): "free some space", os.strerror(errno.EROFS): "make it writable",
            os.strerror(errno.EACCES): "make it writable",
            "is not a valid OptimizerNames": "take one of these",
            "unexpected pos": f"{os.strerror(errno.ENOSPC)}: free some space",  # as torch.save says it
            "out of memory": LESS_MEMORY, "allocate memory": LESS_MEMORY, "Unable to allocate": LESS_MEMORY,
            "bad_alloc": LESS_MEMORY, "failed to map segment": LESS_MEMORY, "start new thread": LESS_MEMORY,
            "could not create a primitive": LESS_MEMORY}  # oneDNN, whose bf16 kernels are made at run time


def check_arguments(file: str, doc: str) -> None:
    """Called by a script before its slow imports: --help and wrong arguments are answered at once, and it
    says about how many minutes the step takes.
    """
    script = Path(file).resolve()
    args = knobs.parse_arguments(sys.argv[1:], script, doc)
    checks.given_sources(script, args.of_task)
    if MAIN_PROCESS and (minutes := checks.minutes(script, args)):
        print(minutes, flush=True)
    for library in ("bitsandbytes", "lm_eval"):  # they advise to install optional packages
        logging.getLogger(library).setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # no progress bars in a log file: libraries read this when they are imported
        os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # in the background it is ignored
        signal.signal(signal.SIGINT, lambda *_: sys.exit(
            f"\n{Path(file).stem} interrupted; nothing half-written. The same command goes on from the last "
            "checkpoint, if there is one"))


def start(main, config_class, *profiles: dict) -> None:
    """Entry point of a script: arguments, knobs, `main(run)`, and one line in place of a user error's
    traceback.
    """
    module = sys.modules[main.__module__]
    script = Path(module.__file__).resolve()
    args = knobs.parse_arguments(sys.argv[1:], script)
    if not MAIN_PROCESS:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        print(f"{script.parent.name}/{script.stem} profile={args.profile} run={args.run}", flush=True)
        run = Run(args, script, knobs.configure(config_class, profiles, args.profile, args.settings))
        with only_one(run) if MAIN_PROCESS else contextlib.nullcontext():
            main(run)
    except Exception as err:
        text = str(err) or "out of memory" * isinstance(err, MemoryError)
        for words, remedy in REMEDIES.items():
            if words in text:
                said = ". ".join(text.split(". ")[:2])  # torch adds advice about its allocator
                if remedy == LESS_MEMORY and "predicted_GiB" in FACTS:
                    said += f"; {FACTS['predicted_GiB']:.1f} GiB were predicted"
                raise SystemExit(f"{script.stem}: {said}; {remedy}, then repeat the command") from None
        raise


@contextlib.contextmanager
def only_one(run: Run):
    """The right to write runs/<run>/<task>, until the process ends. SystemExit if another process has it."""
    path = results.ROOT / "runs" / ".locks" / f"{run.name}-{run.task}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{results.shown(run.folder)} is being written by {path.read_text()}: wait "
                             "until it ends, or take another RUN= name") from None
        path.write_text(f"{run.step}, process {os.getpid()}, since {time.strftime('%H:%M')}")
        yield


class Run:
    """One step of one task: its knobs `cfg`, where it reads and writes, what it has read so far."""

    def __init__(self, args, script: Path, config):
        self.profile, self.name, self.settings, self.cfg = args.profile, args.run, args.settings, config
        self.task, self.step = script.parent.name, script.stem
        self.folder = results.ROOT / "runs" / self.name / self.task  # weights, predictions, caches
        self.result_path = results.ROOT / "results" / self.name / self.task / f"{self.step}.json"
        self.remedy = results.command(self.result_path, args.profile, args.asked)
        self.inputs: dict[str, str] = {}
        self.verified: set[str] = set()  # artifacts of earlier steps
        self.started = time.monotonic()

    def load(self, step: str) -> dict:
        """An earlier step's result, now an input. SystemExit if it is missing, cut short or of other knobs.
        """
        path = self.result_path.with_name(f"{step}.json")
        result = results.read(path, self.remedy)
        for name, commit in self.hub_commits().items():
            if result["inputs"].get(name, commit) != commit:
                source = name.rpartition(":")[2].partition("@")[0]
                raise SystemExit(f"{results.shown(path)} was made with {source} at commit "
                                 f"{result['inputs'][name]}, this machine now has {commit}: name one, as in "
                                 f"{source}@{commit}, or another RUN=")
        mine = dataclasses.asdict(self.cfg)
        for name, value in results.stored(mine).items():
            made = result["config"].get(name, value)
            if value not in (made, result["env"].get(name, made)):  # or what "auto" stood for
                raise SystemExit(f"{results.shown(path)} was made with {name}={made!r}, this step "
                                 f"has {value!r}: give every step the same value, or another RUN= name")
        self.inputs[f"step:{step}"] = results.result_hash(result)
        UPSTREAM.update({name: value for name, value in result["env"].items() if name == "compute"})
        whole = {name: mine[name] for name in results.SOURCES if name in mine and name in result["config"]}
        return result | {"config": result["config"] | whole}  # sources as this machine finds them

    def artifact(self, step: str, name: str) -> Path:
        """A file or folder that an earlier step left under runs/. SystemExit if it is not there, or not what
        that step's result says: new results beside an old runs/, or an edit.
        """
        path = self.folder / name
        if not path.exists():
            raise SystemExit(f"{results.shown(path)} is missing (made by {step}): {self.remedy}")
        if name not in self.verified:
            made = results.read(self.result_path.with_name(f"{step}.json"), self.remedy)
            if results.sha256(path) != made["artifacts"].get(name):
                raise SystemExit(f"{results.shown(path)} is not what {step} left there (SHA-256 differs from "
                                 f"its result): delete it, then {self.remedy}")
            self.verified.add(name)
        return path

    def rows(self, split: str) -> list[dict]:
        """The rows that 01 left in <split>.jsonl, which is checked as `artifact` says."""
        return results.read_rows(self.artifact("01_data", f"{split}.jsonl"))

    def hub_commits(self) -> dict[str, str]:
        """{"hub:model:owner/name": commit} of what this step takes from a hub, if it is on this machine
        yet.
        """
        sources = {"model": getattr(self.cfg, "model", ""),
                   "dataset": hub.data_set(getattr(self.cfg, "data", ""))[0]}
        commits = {f"hub:{kind}:{source}": hub.cached_revision(source, kind)
                   for kind, source in sources.items() if hub.is_id(source)}
        return {name: commit for name, commit in commits.items() if commit}

    def track(self, path: Path) -> None:
        """Make a data file or a model folder that this step reads part of its freshness."""
        kind = "file" if Path(os.path.abspath(path)).is_relative_to(results.ROOT) else "outside"
        self.inputs[f"{kind}:{results.public(str(path))}"] = results.source_hash(path)

    def log(self, **values) -> None:
        """One key=value line; the last line of a step is its verdict."""
        words = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()]
        print(results.visible(" ".join(words)).replace("\n", "\\n"), flush=True)

    def save(self, rows: list[dict], artifacts: list[str] = (), tokens_per_second: float | None = None):
        """Write the step's result file. Values stay numbers at full precision, and missing ones are null."""
        model = Path(getattr(self.cfg, "model", "")).expanduser()
        if model.name and model.is_dir():
            self.track(model)
        seconds = time.monotonic() - self.started
        cost = {"seconds": round(seconds, 1), "peak_memory_bytes": peak_memory(),
                "tokens_per_second": tokens_per_second}
        result = {"run": self.name, "profile": self.profile, "task": self.task, "step": self.step,
                  "settings": results.stored(self.settings),
                  "config": results.stored(dataclasses.asdict(self.cfg)), "rows": rows,
                  "inputs": {**results.imported_modules(), **self.inputs, **self.hub_commits()},
                  "artifacts": {name: results.sha256(self.folder / name) for name in artifacts},
                  "env": environment(), "cost": cost}
        results.write_atomic(self.result_path, results.sealed(result))
        place = results.shown(self.result_path)
        print(f"{self.step}: wrote {place} after {seconds / 60:.1f} min", flush=True)


def environment() -> dict:
    """Versions, device and commit of this process."""
    env = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), **FACTS}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            env[package] = importlib.metadata.version(package)
    info = Path("/proc/cpuinfo")
    cpu = re.search(r"model name\s*: (.+)", info.read_text()) if info.exists() else None
    # the cores this process may use, where the system says (taskset, a container)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    env["device"] = f"{cpu[1] if cpu else platform.processor()}, {cores} cores"
    if cuda := accelerator():
        env["device"] = cuda.get_device_name()

    def git(*words):
        with contextlib.suppress(FileNotFoundError):  # no git on this machine
            done = subprocess.run(["git", *words], cwd=results.ROOT, capture_output=True, text=True,
                                  check=False)
            return done.stdout.strip()
    env["commit"] = git("rev-parse", "--short=12", "HEAD") or os.environ.get("GIT_COMMIT")  # without .git
    env["dirty"] = bool(git("status", "--porcelain", "-uno", "--", ".", ":!results", ":!report.md"))
    return env


def accelerator():
    """torch.cuda if this process uses torch on a CUDA or ROCm device, else None."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return cuda if cuda and cuda.is_available() else None


def peak_memory() -> int:
    """Peak bytes: allocated on the accelerator if one is used, else the resident set of this process."""
    if cuda := accelerator():
        return cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
