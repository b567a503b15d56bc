"""Result files, knobs and freshness: one JSON per step, and content hashes that say whether it is current.

Make gives the order of the steps. A result is fresh when its arguments and the hashes of everything it was
made from are what they were: repository modules (without comments and docstrings), earlier results, files,
hub commits. This module loads neither numpy nor torch, so `make` on an up-to-date tree takes a fraction of
a second.

    python -m common.results fresh results/cpu/task1_decoder/03_train.json [the step's own arguments]

exits with 0 and says "fresh", with 1 and names what changed, or with 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from common import hub

ROOT = Path(__file__).resolve().parent.parent
# these never change a number
PLUMBING = {"common/results.py", "common/hub.py", "common/checks.py", "common/card.py", "common/__init__.py"}
UPSTREAM: dict = {}  # what earlier steps chose by themselves, of those this process has loaded
FACTS: dict = {}  # what this process chose by itself (number format, threads): part of every result's `env`
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # under torchrun only the first process prints and writes
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "lm-eval",
            "sentence-transformers", "tokenizers", "numpy", "scipy", "scikit-learn")
PROFILES = ("smoke", "cpu", "gpu")
SOURCES = ("model", "data", "columns", "benchmark", "terms")  # knobs that are variables of the Makefile
CHOICES = {"compute": ("auto", "bf16", "fp16", "fp32"), "precision": ("nf4", "bf16", "fp16", "fp32"),
           "gradient_checkpointing": ("auto", "on", "off")}
LESS_MEMORY = "SET='eval_batch_size=.. rows_per_pass=..' lower, or a smaller MODEL="
# Words in an error of the system or of a library, and what a user can do about it.
REMEDIES = {os.strerror(errno.ENOSPC): "free some space", os.strerror(errno.EROFS): "make it writable",
            os.strerror(errno.EACCES): "make it writable",
            "unexpected pos": f"{os.strerror(errno.ENOSPC)}: free some space",  # as torch.save says it
            "out of memory": LESS_MEMORY, "allocate memory": LESS_MEMORY, "Unable to allocate": LESS_MEMORY,
            "bad_alloc": LESS_MEMORY, "failed to map segment": LESS_MEMORY, "start new thread": LESS_MEMORY}
AT_LEAST_1 = {"lora_r", "lora_alpha", "batch_size", "eval_batch_size", "eval_every", "max_steps", "log_every",
              "max_prompt_tokens", "max_completion_tokens", "max_new_tokens", "max_tokens", "bucket"}


# --------------------------------------------------------------------------------------------------- files

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


# -------------------------------------------------------------------------------------------------- hashes

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
    """{path: source hash} of the repository's modules that this process has imported."""
    files = [getattr(module, "__file__", None) or "" for module in list(sys.modules.values())]
    names = {shown(Path(file).resolve()) for file in files}
    return {name: source_hash(ROOT / name) for name in sorted(names - PLUMBING)
            if re.fullmatch(r"(common|task\w+)/\w+\.py", name) and (ROOT / name).exists()}


# --------------------------------------------------------------------------------------------------- knobs

def knobs(path: Path) -> dict[str, dict[str, str]]:
    """{name: {"value" (source text), "reason" (the comment above it)}} of the class `Config` in a script."""
    lines = path.read_text(encoding="utf-8").splitlines()

    def above(field):
        start = field.lineno - 1
        while re.match(r"\s*# (?!--)", lines[start - 1]):  # "# -- the optimiser --" is a heading
            start -= 1
        return " ".join(line.strip("# ") for line in lines[start:field.lineno - 1])

    return {field.target.id: {"value": ast.unparse(field.value), "reason": above(field)}
            for node in ast.parse("\n".join(lines)).body if getattr(node, "name", "") == "Config"
            for field in node.body if isinstance(field, ast.AnnAssign)}


def value_of(name: str, text: str, default):
    """The value that `text` gives to a knob, in the type of its default. SystemExit if it cannot be one."""
    kind, least = type(default), int(name in AT_LEAST_1)
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        number = kind in (int, float)
        if value not in CHOICES.get(name, [value]) or (number and not least <= value < math.inf):
            raise ValueError
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: f"a whole number, {least} or more",
                  float: "a number, 0 or more", str: f"one of {', '.join(CHOICES.get(name, []))}"}[kind]
        raise SystemExit(f"knob {name}={text!r}: expected {wanted}") from None
    return value


def parse_arguments(argv: list[str], script: Path, doc: str = "") -> argparse.Namespace:
    """The arguments that every step takes, checked against the script's source, before anything is imported.

    `settings` keeps the knobs of this step: one SET serves `make`, so a knob of another step or task is no
    error, and `asked` keeps it for the command that a message proposes.
    """
    parser = argparse.ArgumentParser(prog=shown(script), description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cpu", help="smoke, cpu (default) or gpu")
    parser.add_argument("--run", help="name of the results folder (default: mine; smoke for that profile)")
    parser.add_argument("--model", help="an embedded model, a model folder or a hub id owner/name[@revision]")
    parser.add_argument("--data", help="corpus, a JSONL, JSON, CSV, TSV, Parquet file, folder of texts, or "
                        "a hub id owner/name[:configuration[:split]][@revision]")
    parser.add_argument("--columns", help="your names of columns: 'prompt=question completion=answer'")
    parser.add_argument("--benchmark", help="task 1: a task definition of lm-eval (YAML), scored beside ours")
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE", help="knobs of any script")
    args = parser.parse_args(argv)
    settings = {}
    for text in args.set:
        name, equals, settings[name] = text.partition("=")
        if not equals:
            raise SystemExit(f"--set {text!r}: expected KNOB=VALUE; a value with blanks in quotes: "
                             "SET=\"'knob=two words'\"")
    settings.update({name: getattr(args, name) for name in SOURCES if getattr(args, name, None)})

    everywhere = {path: knobs(path) for path in script.parent.parent.glob("task*/*.py")}
    names = set().union(*everywhere.values())
    for name in settings.keys() - names:
        near = difflib.get_close_matches(name, names, 1) or sorted(names)
        raise SystemExit(f"unknown knob {name!r}: did you mean {' or '.join(map(repr, near))}?")
    args.run = args.run or default_run(args.profile)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", args.run):
        raise SystemExit(f"RUN={args.run!r} is a folder name: letters, digits, '.', '_' and '-' only")
    if args.profile not in PROFILES:
        raise SystemExit(f"unknown profile {args.profile!r}: choose one of {', '.join(PROFILES)}")
    declared = everywhere.get(script.with_name("task.py"), {}) | everywhere[script]
    args.asked = dict(sorted(settings.items()))
    args.settings = {name: value for name, value in args.asked.items() if name in declared}
    for name, text in args.settings.items():
        with contextlib.suppress(ValueError):  # a default that is no literal is text
            value_of(name, text, ast.literal_eval(declared[name]["value"]))
    return args


def check_arguments(file: str, doc: str) -> None:
    """Called by a script before its slow imports: --help and wrong arguments are answered at once, and it
    says about how many minutes the step takes.
    """
    from common import checks
    script = Path(file).resolve()
    args = parse_arguments(sys.argv[1:], script, doc)
    checks.sources(script, args.settings)
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


def configure(config_class, profiles: tuple[dict, ...], profile: str, settings: dict):
    """The step's Config: defaults, then the profile's overrides (shared ones first), then settings."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    overrides = {name: value for part in profiles for name, value in part[profile].items()}
    typed = {name: value_of(name, text, defaults[name]) for name, text in settings.items()}
    for name, value in (overrides | typed).items():
        print(f"  {name}={value!r} ({'command line' if name in typed else f'profile {profile}'})")
    return config_class(**overrides | typed)


def config_of(config_class, stored: dict, **changes):
    """A Config with the knobs of a stored result, except for `changes`: what an ablation trains with."""
    known = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in {**stored, **changes}.items() if name in known})


def chosen(only: str, possible: list[str]) -> list[str]:
    """The rows of ablations named in `only`, separated by ";", or all. SystemExit for a name that is none."""
    names = [name.strip() for name in only.split(";")] if only else possible
    if unknown := [name for name in names if name not in possible]:
        raise SystemExit(f"only={only!r}: no row {unknown[0]!r}; rows: {'; '.join(possible)}")
    return names


def cached(path: Path, given: list, make) -> dict:
    """What `make()` returned, kept at `path` as long as `given` (knobs, data) and the code are the same."""
    identity = digest([given, imported_modules()])
    if not (path.exists() and json.loads(path.read_text())["identity"] == identity):
        write_atomic(path, json.dumps({"identity": identity, **make()}))
    return json.loads(path.read_text())


# -------------------------------------------------------------------------------------------------- a step

class Run:
    """One step of one task: its knobs `cfg`, where it reads and writes, what it has read so far."""

    def __init__(self, args, script: Path, config):
        self.profile, self.name, self.settings, self.cfg = args.profile, args.run, args.settings, config
        self.task, self.step = script.parent.name, script.stem
        self.folder = ROOT / "runs" / self.name / self.task  # weights, predictions, caches: git-ignored
        self.result_path = ROOT / "results" / self.name / self.task / f"{self.step}.json"
        self.remedy = command(self.result_path, args.profile, args.asked)
        self.inputs: dict[str, str] = {}
        self.verified: set[str] = set()  # artifacts of earlier steps
        self.started = time.monotonic()

    def load(self, step: str) -> dict:
        """An earlier step's result, now an input. SystemExit if it is missing, cut short or of other knobs.
        """
        path = self.result_path.with_name(f"{step}.json")
        result = read(path, self.remedy)
        for name, commit in self.hub_commits().items():
            if result["inputs"].get(name, commit) != commit:
                source = name.rpartition(":")[2].partition("@")[0]
                raise SystemExit(f"{shown(path)} was made with {source} at commit {result['inputs'][name]}, "
                                 f"this machine now has {commit}: name one, as in {source}@{commit}, or "
                                 "another RUN=")
        knobs = dataclasses.asdict(self.cfg)
        for name, value in stored(knobs).items():
            made = result["config"].get(name, value)
            if value not in (made, result["env"].get(name, made)):  # or what "auto" stood for
                raise SystemExit(f"{shown(path)} was made with {name}={made!r}, this step "
                                 f"has {value!r}: give every step the same value, or another RUN= name")
        self.inputs[f"step:{step}"] = result_hash(result)
        UPSTREAM.update({name: value for name, value in result["env"].items() if name == "compute"})
        whole = {name: knobs[name] for name in SOURCES if name in knobs and name in result["config"]}
        return result | {"config": result["config"] | whole}  # sources as this machine finds them

    def artifact(self, step: str, name: str) -> Path:
        """A file or folder that an earlier step left under runs/. SystemExit if it is not there, or not what
        that step's result says: new results beside an old runs/, or an edit.
        """
        path = self.folder / name
        if not path.exists():
            raise SystemExit(f"{shown(path)} is missing (made by {step}): {self.remedy}")
        if name not in self.verified:
            made = read(self.result_path.with_name(f"{step}.json"), self.remedy)["artifacts"].get(name)
            if sha256(path) != made:
                raise SystemExit(f"{shown(path)} is not what {step} left there (SHA-256 differs from its "
                                 f"result): delete it, then {self.remedy}")
            self.verified.add(name)
        return path

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
        kind = "file" if Path(os.path.abspath(path)).is_relative_to(ROOT) else "outside"
        self.inputs[f"{kind}:{public(str(path))}"] = source_hash(path)

    def log(self, **values) -> None:
        """One key=value line; the last line of a step is its verdict."""
        words = [f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()]
        print(visible(" ".join(words)).replace("\n", "\\n"), flush=True)

    def save(self, rows: list[dict], artifacts: list[str] = (), tokens_per_second: float | None = None):
        """Write the step's result file. Values stay numbers at full precision, and missing ones are null."""
        model = Path(getattr(self.cfg, "model", "")).expanduser()
        if model.name and model.is_dir():
            self.track(model)
        seconds = time.monotonic() - self.started
        cost = {"seconds": round(seconds, 1), "peak_memory_bytes": peak_memory(),
                "tokens_per_second": tokens_per_second}
        result = {"run": self.name, "profile": self.profile, "task": self.task, "step": self.step,
                  "settings": stored(self.settings), "config": stored(dataclasses.asdict(self.cfg)),
                  "rows": rows,
                  "inputs": {**imported_modules(), **self.inputs, **self.hub_commits()},
                  "artifacts": {name: sha256(self.folder / name) for name in artifacts},
                  "env": environment(), "cost": cost}
        write_atomic(self.result_path, sealed(result))
        print(f"{self.step}: wrote {shown(self.result_path)} after {seconds / 60:.1f} min", flush=True)


def start(main, config_class, *profiles: dict) -> None:
    """Entry point of a script: arguments, knobs, `main(run)`, and one line in place of a user error's
    traceback.
    """
    module = sys.modules[main.__module__]
    script = Path(module.__file__).resolve()
    args = parse_arguments(sys.argv[1:], script)
    if not MAIN_PROCESS:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        print(f"{script.parent.name}/{script.stem} profile={args.profile} run={args.run}", flush=True)
        run = Run(args, script, configure(config_class, profiles, args.profile, args.settings))
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
    path = ROOT / "runs" / ".locks" / f"{run.name}-{run.task}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{shown(run.folder)} is being written by {path.read_text()}: wait until it "
                             "ends, or take another RUN= name") from None
        path.write_text(f"{run.step}, process {os.getpid()}, since {time.strftime('%H:%M')}")
        yield


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
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
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


# ----------------------------------------------------------------------------------------------- freshness

def changed(path: Path, args=None, given=()) -> str | None:
    """What differs between now and when the result at `path` was made; None if nothing does.

    Of a file or folder outside the repository results keep the name only: it is compared if it is among the
    sources in `args` (paths `given`) or beside one of them.
    """
    if not path.exists():
        return "no result yet"
    try:
        result = read(path)
    except SystemExit as err:
        return str(err)
    if args:
        asked = stored(args.settings)
        given = [Path(args.settings[name]).expanduser() for name in SOURCES if name in args.settings]
        if (args.profile, asked) != (result["profile"], result["settings"]):
            return (f"asked for profile={args.profile} {asked}, "
                    f"stored is profile={result['profile']} {result['settings']}")
    for name, old in result["inputs"].items():
        kind, _, rest = name.rpartition(":")
        if kind == "step":
            source = path.with_name(f"{rest}.json")
            if reason := changed(source, given=given):
                return f"{rest} is stale ({reason})"
            now = result_hash(read(source))
        elif kind.startswith("hub:"):  # a clone without the repository in its cache keeps its results
            now = hub.cached_revision(rest, kind.removeprefix("hub:")) or old
            if now != old:
                return f"{rest} is at commit {now[:12]}, was {old[:12]}"
        elif kind == "outside":
            places = [place for path in given for place in (path, path.with_name(rest))
                      if place.name == rest and place.exists()]
            now = source_hash(places[0]) if places else old
        elif (ROOT / rest).exists():
            now = source_hash(ROOT / rest)
        else:
            return f"{name} is gone"
        if now != old:
            return f"{name} changed"
    return None


def stale_reason(path: Path, args=None) -> str | None:
    """None if the step that writes `path` need not run with `args`, else why.

    A clone has results but not runs/: what a step left there matters only if a later step has to run.
    """
    if reason := changed(path, args):
        return reason
    result = read(path)
    folder = ROOT / "runs" / result["run"] / result["task"]
    missing = [name for name in result["artifacts"] if not (folder / name).exists()]
    scripts = sorted((ROOT / result["task"]).glob("[0-9]*.py"))
    later = [script.stem for script in scripts if script.stem > result["step"]]
    later += ["ablations"] * path.with_name("ablations.json").exists()
    for step in later if missing else []:
        if reason := changed(path.with_name(f"{step}.json")):
            return f"{shown(folder / missing[0])} is missing and {step} may need it ({reason})"
    return None


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] != "fresh":
        raise SystemExit("usage: python -m common.results fresh results/RUN/TASK/STEP.json [arguments]")
    path = Path(argv[1]).absolute()
    script = ROOT / path.parent.name / f"{path.stem}.py"
    try:
        reason = stale_reason(path, parse_arguments(argv[2:], script))
    except SystemExit as wrong:  # the arguments, not the result: running the step would only say it again
        print(wrong, file=sys.stderr)
        return 2
    print(f"{path.parent.name}/{path.stem}: {'fresh' if reason is None else 'stale, ' + reason}")
    return reason is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
