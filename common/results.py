"""Result files and their freshness: one JSON per step, written to a temporary name and renamed.

Make gives the order, hashes give the truth. A result is fresh when the hash of every repository module it imported (AST without
docstrings and comments), of every upstream result and of every tracked file it read is what it was. Light on purpose: importing
this module loads neither numpy nor torch, so `make` on an up-to-date tree costs a fraction of a second.

    python -m common.results fresh results/cpu/task1_decoder/03_train.json [the step's own arguments]

exits 0 and says "fresh", exits 1 and names what changed, or exits 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import difflib
import errno
import fcntl
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
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path

from common import hub

ROOT = Path(__file__).resolve().parent.parent
# storing, rendering and downloading never change a number
PLUMBING = {"common/results.py", "common/report.py", "common/hub.py", "common/__init__.py"}
UPSTREAM: dict = {}  # the same of the earlier steps that this process has loaded
FACTS: dict = {}  # what this process chose by itself (dtype, threads): part of every result's `env`
MAIN_PROCESS = os.environ.get("RANK", "0") == "0"  # under torchrun only the first process prints and writes results
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "lm-eval", "sentence-transformers",
            "tokenizers", "numpy", "scipy", "scikit-learn")


# ---------------------------------------------------------------------------------------------------------------- files

def write_atomic(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader sees the old file or the whole new one. SystemExit if the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as err:
        if err.errno == errno.ENOSPC:
            raise SystemExit(f"disk full while writing {shown(path)} ({len(text)} characters): free some space, "
                             "then repeat the command; the earlier file is untouched") from None
        raise
    finally:
        Path(temporary).unlink(missing_ok=True)


def shown(path: Path | str) -> str:
    """A path as people should read it: relative to the repository where possible."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_absolute() and path.is_relative_to(ROOT) else str(path)


def sha256(path: Path) -> str:
    """Hash of a file, or of all files of a folder by name."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(file.relative_to(path).as_posix().encode() if path.is_dir() else b"")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read(path: Path, remedy: str = "") -> dict:
    """A stored result. SystemExit with the command that makes it (`remedy`) if it is missing or cut short."""
    remedy = remedy or command(path, "", {})
    if not path.exists():
        raise SystemExit(f"{shown(path)} is missing: {remedy}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise SystemExit(f"{shown(path)} is cut short or not JSON ({err}): delete it, then {remedy}") from None


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSON-lines file, in order."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def command(path: Path, profile: str, settings: dict[str, str]) -> str:
    """The make command that builds results/<run>/<task>/<step>.json with these arguments."""
    run, task = path.parent.parent.name, "ablations" if path.stem == "ablations" else path.parent.name
    profile = profile or (run if run in ("smoke", "gpu") else "cpu")
    words = [f"make {task.split('_')[0]}"]
    words += [f"PROFILE={profile}"] if profile != "cpu" else []
    words += [f"RUN={run}"] if run != profile or settings else []
    words += [f"{name.upper()}={shlex.quote(settings[name])}" for name in ("model", "data", "terms") if name in settings]
    rest = [f"{k}={v}" if shlex.quote(v) == v else f"'{k}={v}'" for k, v in settings.items() if k not in ("model", "data", "terms")]
    return " ".join(words + ([f'SET="{" ".join(rest)}"'] if rest else []))


# ---------------------------------------------------------------------------------------------------------------- hashes

def canonical(node) -> str:
    """An AST as text that is equal on Python 3.10-3.13: ast.dump's optional fields differ between them."""
    if isinstance(node, ast.AST):
        fields = (f"{name}={canonical(value)}" for name, value in ast.iter_fields(node)
                  if value not in (None, []) and name not in ("kind", "type_comment", "ctx"))
        return f"{type(node).__name__}({','.join(fields)})"
    return f"[{','.join(map(canonical, node))}]" if isinstance(node, list) else repr(node)


def source_hash(path: Path) -> str:
    """Hash of a file that ignores what cannot change its result: comments and docstrings of Python, nothing elsewhere."""
    if path.suffix != ".py":
        return sha256(path)[:16]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(canonical(tree).encode()).hexdigest()[:16]


def result_hash(result: dict) -> str:
    """Hash of what a later step can depend on: configuration, rows, artifacts. Not time, machine or memory."""
    kept = {key: result.get(key) for key in ("config", "rows", "artifacts")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def imported_modules() -> dict[str, str]:
    files = {Path(module.__file__).resolve() for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    names = {path.relative_to(ROOT).as_posix(): path for path in files
             if path.suffix == ".py" and path.exists() and path.is_relative_to(ROOT) and ".venv" not in path.parts}
    return {name: source_hash(path) for name, path in sorted(names.items())
            if name not in PLUMBING and not name.startswith("tests/")}


# ---------------------------------------------------------------------------------------------------------------- knobs

def knobs(path: Path) -> dict[str, dict]:
    """Knobs of the dataclass `Config` and of `PROFILES` in a script, with the reason in the comment beside or above each.

    Returns {name: {"value": source text, "reason": text, "profiles": {profile: {"value", "reason"}}}}.
    """
    text = path.read_text(encoding="utf-8")
    comments, alone = {}, set()
    for token in tokenize.generate_tokens(iter(text.splitlines(keepends=True)).__next__):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").strip()
            if not token.line[:token.start[1]].strip():
                alone.add(token.start[0])

    def reason(node) -> str:
        above, line = [], node.lineno - 1
        while line in alone and not comments[line].startswith("--"):  # "# -- the optimiser --" is a heading
            above.insert(0, comments[line])
            line -= 1
        after, line = [comments.get(node.end_lineno, "")], node.end_lineno + 1
        beside = bool(after[0])
        while beside and line in alone and text.splitlines()[line - 1].index("#") > node.col_offset + 8:
            after.append(comments[line])  # a trailing comment that runs on, indented, below the value
            line += 1
        return " ".join(filter(None, above + after))

    found: dict[str, dict] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            for field in node.body:
                if isinstance(field, ast.AnnAssign) and field.value is not None:
                    found[field.target.id] = {"value": ast.unparse(field.value), "reason": reason(field), "profiles": {}}
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PROFILES":
            for profile, overrides in zip(node.value.keys, node.value.values):
                for keyword in overrides.keywords:
                    entry = found.setdefault(keyword.arg, {"value": "", "reason": "", "profiles": {}})
                    entry["profiles"][profile.value] = {"value": ast.unparse(keyword.value), "reason": reason(keyword)}
    return found


def known_knobs(folder: Path) -> dict[str, dict[str, dict]]:
    """{file stem: its knobs, as from `knobs`} of a task; what task.py declares is shared by its scripts."""
    own = {path.stem: knobs(path) for path in sorted(folder.glob("*.py"))}
    return {stem: own.get("task", {}) | found for stem, found in own.items() if stem != "task"}


# what a knob may be, said before anything is imported
CHOICES = {"compute": ("auto", "bf16", "fp16", "fp32"), "precision": ("nf4", "bf16", "fp16", "fp32"), "gradient_checkpointing": ("auto", "on", "off")}
AT_LEAST_1 = {"lora_r", "lora_alpha", "batch_size", "eval_batch_size", "eval_every", "max_steps", "log_every", "max_prompt_tokens",
              "max_completion_tokens", "max_new_tokens", "max_tokens", "bucket"}


def value_of(name: str, text: str, default):
    """The value that `text` gives to a knob, in the type of its default. SystemExit if it is none, negative or not a number."""
    kind, least = type(default), name in AT_LEAST_1
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if kind in (int, float) and not (math.isfinite(value) and value >= least):
            raise ValueError
        if value not in CHOICES.get(name, [value]):
            raise ValueError
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: f"a whole number, {int(least)} or more", float: "a number, 0 or more",
                  str: f"one of {', '.join(CHOICES.get(name, []))}"}[kind]
        raise SystemExit(f"knob {name}={text!r}: expected {wanted}") from None
    return value


def parse_arguments(argv: list[str], script: Path, doc: str | None = None) -> argparse.Namespace:
    """Arguments every step shares. `settings` keeps only this step's knobs: those of other steps and tasks are no error, so
    that one SET serves `make`; what no step has is one. Values are checked against the types in the source, which needs no import."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=shown(script), description=doc, formatter_class=formatter)
    parser.add_argument("--profile", default="cpu", help="smoke, cpu (default) or gpu")
    parser.add_argument("--run", help="name of the results folder (default: the profile's name)")
    parser.add_argument("--model", help="an embedded model, a model folder or a hub id owner/name[@revision]")
    parser.add_argument("--data", help="corpus, a JSONL/CSV/Parquet file or a hub id owner/name[@revision]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KNOB=VALUE", help="any knob of the task's scripts")
    args = parser.parse_args(argv)
    settings = {}
    for text in args.set:
        name, equals, value = text.partition("=")
        if not equals:
            raise SystemExit(f"--set {text!r}: expected KNOB=VALUE; a value with blanks in quotes: SET=\"'knob=two words'\"")
        settings[name] = value
    settings.update({name: getattr(args, name) for name in ("model", "data") if getattr(args, name)})
    own = known_knobs(script.parent)
    others = [known_knobs(folder) for folder in script.parent.parent.glob("task[0-9]_*") if folder != script.parent]
    everything = sorted({name for task in (own, *others) for step in task.values() for name in step})
    for name in settings:
        if name not in everything:
            near = difflib.get_close_matches(name, everything, 1)
            mine = sorted({name for step in own.values() for name in step})
            hint = f"did you mean {near[0]!r}?" if near else f"knobs of {script.parent.name}: {', '.join(mine)}"
            raise SystemExit(f"unknown knob {name!r}: {hint}")
    args.run = args.run or args.profile
    if not re.fullmatch(r"[A-Za-z0-9._-]+", args.run) or args.run.startswith("."):
        raise SystemExit(f"RUN={args.run!r} is a folder name: letters, digits, '.', '_' and '-' only")
    declared = own[script.stem]
    args.settings = {name: value for name, value in sorted(settings.items()) if name in declared}
    for name, text in args.settings.items():
        with contextlib.suppress(ValueError):  # a default that is no literal is text
            value_of(name, text, ast.literal_eval(declared[name]["value"]))
    profiles = [ast.literal_eval(key) for node in ast.parse(script.read_text(encoding="utf-8")).body
                if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PROFILES" for key in node.value.keys]
    if args.profile not in profiles:
        raise SystemExit(f"unknown profile {args.profile!r}: choose one of {', '.join(profiles)}, as in make task1 PROFILE=cpu")
    return args


def check_arguments(file: str, doc: str) -> None:
    """Called by a script before its large imports: wrong arguments and --help are answered at once."""
    parse_arguments(sys.argv[1:], Path(file).resolve(), doc)


def configure(config_class, profiles: tuple[dict, ...], profile: str, settings: dict):
    """The step's Config: defaults, then the profile's overrides (shared ones first), then settings; prints what differs."""
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    chosen = {name: (value, f"profile {profile}") for overrides in profiles for name, value in overrides[profile].items()}
    chosen |= {name: (value_of(name, text, defaults[name]), "command line") for name, text in settings.items()}
    for name, (value, origin) in chosen.items():
        print(f"  {name}={value!r} ({origin})")
    return dataclasses.replace(config_class(), **{name: value for name, (value, _) in chosen.items()})


# ---------------------------------------------------------------------------------------------------------------- rows of ablations

def chosen(only: str, possible: list[str]) -> list[str]:
    """The names in `only`, separated by ";", or all; SystemExit for a name that is not possible."""
    names = [name.strip() for name in only.split(";")] if only else possible
    if unknown := [name for name in names if name not in possible]:
        raise SystemExit(f"only={only!r}: no row {unknown[0]!r}; rows: {'; '.join(possible)}")
    return names


def cached(path: Path, given: list, make) -> dict:
    """What `make()` returned, kept at `path` as long as `given` (knobs, data) and the code imported so far are the same."""
    identity = hashlib.sha256(json.dumps([given, imported_modules()]).encode()).hexdigest()
    if not (path.exists() and json.loads(path.read_text())["identity"] == identity):
        write_atomic(path, json.dumps({"identity": identity, **make()}))
    return json.loads(path.read_text())


# ---------------------------------------------------------------------------------------------------------------- a step

class Run:
    """One step of one task: its knobs, where it reads and writes, what it has read so far."""

    def __init__(self, args, script: Path, config):
        self.profile, self.name, self.settings, self.cfg = args.profile, args.run, args.settings, config
        self.remedy = command(ROOT / "results" / args.run / script.parent.name / f"{script.stem}.json", args.profile, args.settings)
        self.task, self.step = script.parent.name, script.stem
        self.folder = ROOT / "runs" / self.name / self.task  # weights, predictions, caches: git-ignored
        self.result_path = ROOT / "results" / self.name / self.task / f"{self.step}.json"
        self.inputs: dict[str, str] = {}
        self.started = time.time()

    def load(self, step: str) -> dict:
        """An upstream result of this run; its hash becomes an input. SystemExit if missing, cut short, or of other knobs."""
        path = self.result_path.with_name(f"{step}.json")
        result = read(path, self.remedy)
        for name, commit in self.hub_commits().items():
            if result["inputs"].get(name, commit) != commit:
                source = name.rpartition(":")[2].partition("@")[0]
                raise SystemExit(f"{shown(path)} was made with {source} at commit {result['inputs'][name]}, this machine now has "
                                 f"{commit}: name one, as in {source}@{commit}, or take another RUN= name")
        for name, value in dataclasses.asdict(self.cfg).items():
            if result["config"].get(name, value) != json.loads(json.dumps(value)):
                raise SystemExit(f"{shown(path)} was made with {name}={result['config'][name]!r}, this step has {value!r}: "
                                 f"give every step the same value, or another RUN= name")
        self.inputs[f"step:{step}"] = result_hash(result)
        UPSTREAM.update({k: v for k, v in result["env"].items() if k == "compute"})
        return result

    def artifact(self, step: str, name: str) -> Path:
        """A file or folder that an upstream step left under runs/. SystemExit if it is not there."""
        path = self.folder / name
        if not path.exists():
            raise SystemExit(f"{shown(path)} is missing (made by {step}): {self.remedy}")
        return path

    def hub_commits(self) -> dict[str, str]:
        """{"hub:model:owner/name": commit} of what this step takes from a hub, as far as it is on this machine yet."""
        sources = [(kind, getattr(self.cfg, knob, "")) for knob, kind in (("model", "model"), ("data", "dataset"))]
        commits = {f"hub:{kind}:{source}": hub.cached_revision(source, kind) for kind, source in sources if hub.is_id(source)}
        return {name: commit for name, commit in commits.items() if commit}

    def track(self, path: Path) -> Path:
        """Make a data file that this step reads part of its freshness."""
        self.inputs[f"file:{shown(path)}"] = source_hash(path)
        return path

    def log(self, **values) -> None:
        """One key=value line; the last line of a step is its verdict."""
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)

    def save(self, rows: list[dict], artifacts: list[str] = (), tokens_per_second: float | None = None) -> Path:
        """Write results/<run>/<task>/<step>.json atomically. Values stay numbers at full precision; missing ones are null."""
        seconds = time.time() - self.started
        result = {"run": self.name, "profile": self.profile, "task": self.task, "step": self.step, "status": "ok",
                  "settings": self.settings, "config": dataclasses.asdict(self.cfg), "rows": rows,
                  "inputs": {**imported_modules(), **self.inputs, **self.hub_commits()},
                  "artifacts": {name: sha256(self.folder / name) for name in artifacts}, "env": environment(),
                  "cost": {"seconds": round(seconds, 1), "peak_memory_bytes": peak_memory(),
                           "tokens_per_second": tokens_per_second}}
        write_atomic(self.result_path, json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        print(f"{self.step}: wrote {shown(self.result_path)} after {seconds / 60:.1f} min", flush=True)
        return self.result_path


def start(main, config_class, *profiles: dict) -> None:
    """Entry point of a numbered script: arguments, knobs, `main(run)`, and one line instead of a traceback for user errors."""
    module = sys.modules[main.__module__]
    script = Path(module.__file__).resolve()
    args = parse_arguments(sys.argv[1:], script, module.__doc__)
    if not MAIN_PROCESS:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        print(f"{script.parent.name}/{script.stem} profile={args.profile} run={args.run}", flush=True)
        if not sys.stderr.isatty():
            hush()
        run = Run(args, script, configure(config_class, profiles, args.profile, args.settings))
        with only_one(run):
            main(run)
    except KeyboardInterrupt:
        raise SystemExit(f"\n{script.stem} interrupted; nothing half-written. The same command goes on from the last "
                         "checkpoint, if there is one") from None
    except Exception as err:
        if getattr(err, "errno", None) == errno.ENOSPC or "No space left on device" in str(err):
            raise SystemExit(f"disk full in {script.stem}: free some space under runs/, then repeat the command") from None
        if type(err).__name__ == "OutOfMemoryError":  # torch's, which this module does not import
            raise SystemExit(f"{script.stem} ran out of the accelerator's memory: SET='eval_batch_size=.. rows_per_pass=..' lower, or a smaller "
                             f"MODEL= ({str(err).split('.')[1].strip()})") from None
        if getattr(err, "errno", None) in (errno.EROFS, errno.EACCES):
            raise SystemExit(f"{script.stem} may not write {shown(err.filename)}: make runs/ and results/ writable") from None
        raise


@contextlib.contextmanager
def only_one(run: Run):
    """The right to write runs/<run>/<task>, until the process ends, however it ends. SystemExit if another process has it."""
    if not MAIN_PROCESS:
        yield
        return
    path = ROOT / "runs" / ".locks" / f"{run.name}-{run.task}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SystemExit(f"{shown(run.folder)} is being written by {file.read()}: wait until it ends, or take another RUN= name") from None
        file.truncate(0)
        file.write(f"{run.step}, process {os.getpid()}, since {time.strftime('%H:%M')}")
        file.flush()
        yield


def hush() -> None:
    """No progress bars in a log file, and no word from lm-eval below an error."""
    os.environ |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def environment() -> dict:
    """Versions, device and commit of this process."""
    env = {"python": platform.python_version(), **FACTS}
    for package in PACKAGES:
        try:
            env[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            env[package] = None
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    cpu = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    env["device"] = cuda.get_device_name() if cuda and cuda.is_available() else \
        f"{cpu.group(1) if cpu else platform.processor()}, {os.cpu_count()} cores"

    def git(*words):
        if not shutil.which("git"):
            return ""
        return subprocess.run(["git", "-C", str(ROOT), *words], check=False, capture_output=True, text=True).stdout.strip()
    env["commit"] = git("rev-parse", "--short=12", "HEAD") or os.environ.get("GIT_COMMIT")  # a copy without .git can be told
    env["dirty"] = bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results", ":!report.md"))
    return env


def peak_memory() -> int:
    """Peak bytes: allocated on the accelerator if one was used, else the resident set of this process."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda and cuda.is_available():
        return cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------- freshness

def changed(path: Path, args=None) -> str | None:
    """What differs between now and when the result at `path` was made, its upstream included; None if nothing does."""
    if not path.exists():
        return "no result yet"
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        inputs = result["inputs"]
    except (ValueError, KeyError):
        return "the result file is cut short or not JSON"
    if args and (args.profile, args.settings) != (result["profile"], result["settings"]):
        return f"asked for profile={args.profile} {args.settings}, stored is profile={result['profile']} {result['settings']}"
    for name, old in inputs.items():
        kind, _, rest = name.rpartition(":")
        if kind.startswith("hub:"):  # what this machine has of it; a clone without it keeps its results
            if (now := hub.cached_revision(rest, kind.removeprefix("hub:"))) not in (None, old):
                return f"{rest} is at commit {now[:12]}, was {old[:12]}"
            continue
        source = path.with_name(f"{rest}.json") if kind == "step" else Path(rest) if Path(rest).is_absolute() else ROOT / rest
        if kind == "step" and (reason := changed(source)):
            return f"{rest} is stale ({reason})"
        if not source.exists():
            return f"{name} is gone"
        try:
            now = result_hash(read(source)) if kind == "step" else source_hash(source)
        except SyntaxError as err:
            return f"{name} does not parse ({err})"
        if now != old:
            return f"{name} changed"
    return None


def stale_reason(path: Path, args=None) -> str | None:
    """None if the step that writes `path` need not run, else why. `args`: the arguments it would be called with."""
    if reason := changed(path, args):
        return reason
    result = read(path)
    runs = ROOT / "runs" / result["run"] / result["task"]
    missing = [name for name in result["artifacts"] if not (runs / name).exists()]
    if missing:  # a clone has the results but not runs/: that matters only if a later step has to run
        readers = [script.stem for script in sorted((ROOT / result["task"]).glob("[0-9]*.py")) if script.stem > result["step"]]
        for later in readers + ["ablations"] * path.with_name("ablations.json").exists():
            if reason := changed(path.with_name(f"{later}.json")):
                return f"{shown(runs / missing[0])} is missing and {later} may need it ({reason})"
    return None


def main(argv: list[str]) -> int:
    if len(argv) < 2 or argv[0] != "fresh":
        raise SystemExit("usage: python -m common.results fresh results/RUN/TASK/STEP.json [arguments of the step]")
    path = Path(argv[1]).absolute()
    script = ROOT / path.parent.name / f"{path.stem}.py"
    if not script.exists():
        raise SystemExit(f"{shown(path)}: no step {shown(script)}")
    try:
        reason = stale_reason(path, parse_arguments(argv[2:], script))
    except SystemExit as wrong:  # the arguments, not the result: running the step would only say it again
        print(wrong, file=sys.stderr)
        return 2
    print(f"{path.parent.name}/{path.stem}: {'fresh' if reason is None else 'stale, ' + reason}")
    return reason is not None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
