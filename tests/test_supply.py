"""What is trusted and what is told: no network, weights that are data only, no name of this machine."""

import ast
import getpass
import os
import pickle
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from pipeline import results
from tests import small
from tests.conftest import copy_repository, environment, one_line, repository_files, step

TEXTS = {".py", ".md", ".j2", ".json", ".jsonl", ".csv", ".toml", ".txt", ".yaml", ".yml", ".svg", ""}
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def product() -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".py" and path.parent.name != "tests"]


def calls(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}, node.lineno


def test_weights_are_data_and_foreign_code_never_runs(record):
    """No pickle, no torch.load, no trust_remote_code but False, nothing written but safetensors."""
    found = []
    for path in product():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            found += [f"{path.name}: {name}" for name in names if name.split(".")[0] in UNSAFE]
        for name, words, line in calls(tree):
            trusted = words.get("trust_remote_code", ast.Constant(False))
            wrong = (name in ("torch.load", "torch.save", "eval", "exec", "numpy.load", "np.load")
                     or not (isinstance(trusted, ast.Constant) and trusted.value is False)
                     or "safe_serialization" in words)
            found += [f"{path.name} line {line}: {name}"] if wrong else []
    assert not found
    record("supply", what="no pickle, torch.load or foreign code", files=len(product()), result="ok")


def of_this_machine() -> re.Pattern:
    """Paths and names that only this machine has, and folders of people on any."""
    home, user = str(Path.home()), getpass.getuser()
    places = {str(results.ROOT), sys.prefix, sysconfig.get_paths()["purelib"], home} - {"/", "/root"}
    words = [re.escape(place) for place in places if len(place) > 3]
    words += [rf"\b{re.escape(user)}\b"] if user not in ("root", "user", "runner") else []
    words += [r"/(home|Users)/\w+/", r"/root/", r"[A-Z]:\\Users\\", r"/tmp/[\w.-]+/"]
    return re.compile("|".join(words))


def test_no_committed_file_names_a_machine_or_a_person(record):
    pattern, files, found = of_this_machine(), repository_files(), []
    for path in files:
        if path.suffix in TEXTS and path.parent.name != "tests":
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{path.relative_to(results.ROOT)}: {match[0]}" for match in pattern.finditer(text)][:3]
    assert not found
    record("supply", what="no path or user name in a committed file", files=len(files), result="ok")


@pytest.mark.parametrize("task", [
    pytest.param(task, marks=[] if task == "task1_decoder" else pytest.mark.faults) for task in small.TASKS])
def test_what_a_run_leaves_is_safe_and_names_no_machine(task, steps, record):
    """Weights in safetensors only, and no path in any text or header, items and examples of 04 included.
    (While 03 trains, the Trainer's checkpoints have optimizer.pt and training_args.bin too; 03 deletes them.)
    """
    own = steps(task)
    own.reach("04_eval")
    own.restore("end")
    files = [file for folder in own.places.values() for file in folder.rglob("*") if file.is_file()]
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")]
    places = [str(own.root.parent.parent), str(results.ROOT), sys.prefix, f"{Path.home()}/"]
    for file in files:
        head = file.read_bytes()[:1 << 20].decode("utf-8", "replace")
        assert not [place for place in places if place in head], file
    record("supply", what="safe files that name no machine", task=task, files=len(files), result="ok")


class Payload:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("task", small.TASKS)
def test_weights_that_are_a_pickle_are_refused_unread(task, repo, tiny_model_folder, tmp_path, record):
    model, made = tmp_path / "model", tmp_path / "made"
    shutil.copytree(tiny_model_folder, model, ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(made)}))
    for name in small.STEPS:
        one_line(step(repo, name, "--run", "pickle", "--model", str(model), task=task),
                 "pytorch_model.bin is a pickle", "safetensors")
    assert not made.exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert made.exists()  # it would have run
    record("supply", what="weights that are a pickle are refused unread", task=task, steps=len(small.STEPS),
           result="ok")


def interpreter(version: str) -> str | None:
    """A Python of this version on PATH that runs, other than the one of these tests, or None."""
    for place in os.environ.get("PATH", "").split(os.pathsep):
        found, said = Path(place) / f"python{version}", "import sys; print(*sys.version_info[:2], sep='.')"
        if found.is_file() and os.access(found, os.X_OK):
            done = subprocess.run([found, "-c", said], capture_output=True, text=True, check=False)
            if done.stdout.strip() == version:
                return str(found)
    return None


@pytest.mark.faults
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_another_python_installs_the_packages_and_passes_the_tests(version, tmp_path, record):
    """As `make test` does it, in a copy with a venv of its own: 6 GB and a quarter of an hour each where pip
    takes a torch with CUDA's libraries, so only with PYTHONS=1.
    """
    found, what = interpreter(version), f"Python {version} installs, passes ruff and the tests"
    here = version == ".".join(map(str, sys.version_info[:2]))
    reason = "the one of these tests" if here else "no such interpreter" if not found else None
    if not reason and not os.environ.get("PYTHONS"):
        reason = "only with PYTHONS=1"
    if reason:
        record("supply", what=what, result=f"not tried: {reason}")
        pytest.skip(reason)
    root = copy_repository(tmp_path / "copy")
    environ = {name: value for name, value in os.environ.items()
               if not name.startswith(("PYTEST_", "FAULT_ROWS", "PYTHONPATH", "MAKE", "MFLAGS"))}
    python = root / ".venv" / "bin" / "python"

    def run(*command: str) -> str:
        done = subprocess.run(list(map(str, command)), cwd=root, env=environ | {"PYTHONPATH": str(root)},
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run(found, "-m", "venv", root / ".venv")
    run(python, "-m", "pip", "install", "--quiet", "-r", "requirements.txt")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes", "-r",
        "requirements-assets.txt")
    run(python, "-m", "ruff", "check", ".")
    passed = re.search(r"(\d+) passed", run(python, "-m", "pytest", "-v", "-p", "no:cacheprovider"))
    assert passed and int(passed[1]) > 500
    record("supply", what=what, tests=int(passed[1]), result="ok")
    shutil.rmtree(root)


LISTENING = """
import runpy, sys
def heard(event, args):
    if event == "socket.getaddrinfo" or event == "socket.connect" and isinstance(args[1], tuple):
        with open(log, "a") as file:
            print(event, args[1] if event == "socket.connect" else args[:2], file=file)
log, *sys.argv = sys.argv[1:]
sys.addaudithook(heard)
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # an attempt that a library swallows is heard too


def offline(root: Path, home: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    """A script in a network namespace without network, with an empty home and cache; what it asked of a
    network stands in home/network.
    """
    home.mkdir(exist_ok=True)
    environ = {k: v for k, v in environment(root).items()
               if not k.startswith(("HF_", "XDG_", "TRANSFORMERS_", "NLTK_"))}
    command = ["unshare", "-rn", sys.executable, "-c", LISTENING, str(home / "network"), script, *arguments]
    return subprocess.run(command, cwd=root, env=environ | {"HOME": str(home), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=900, check=False)


def no_namespace() -> str | None:
    """Why this machine has no network namespaces, or None."""
    try:
        done = subprocess.run(["unshare", "-rn", "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "no unshare"
    return done.stderr.strip() if done.returncode else None


def test_an_attempt_that_is_swallowed_is_heard(tmp_path):
    if reason := no_namespace():
        pytest.skip(reason)
    (tmp_path / "asks.py").write_text("import contextlib, socket\nwith contextlib.suppress(OSError):\n"
                                      "    socket.create_connection(('hub.example', 443))\n")
    assert offline(tmp_path, tmp_path / "home", "asks.py").returncode == 0
    assert "hub.example" in (tmp_path / "home" / "network").read_text()


@pytest.mark.parametrize("task", [
    "one step", *(pytest.param(task, marks=pytest.mark.faults) for task in small.TASKS)])
def test_nothing_asks_a_network(task, repo, tmp_path, record):
    """The smoke profile after set-up with default models and data; the quick one has a tiny model."""
    if reason := no_namespace():
        record("supply", what="no network", task=task, result=f"not tried: {reason}")
        pytest.skip(reason)
    quick = task == "one step"
    name, names = (small.TASKS[0], small.STEPS[:1]) if quick else (task, small.STEPS)
    more = small.arguments(repo, name, repo) if quick else []
    for each in names:
        done = offline(repo, tmp_path / "home", f"{name}/{each}.py", "--profile", "smoke", "--run", "offline",
                       *more)
        assert done.returncode == 0, f"{each}: {done.stderr[-1500:]}"
        asked = tmp_path / "home" / "network"
        assert not asked.exists(), asked.read_text()
    record("supply", what="no network", task=name, steps=len(names), result="ok")
