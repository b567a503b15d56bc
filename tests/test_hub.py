"""Models and data sets from a small local hub: what is downloaded, what is kept, what goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import constants, hf_hub_download
from safetensors.numpy import save_file

from pipeline import results
from sources import data, hub
from tests.conftest import one_line
from tests.hub_server import Hub, Repository, commit_of, files_of

REFUSED = "http://127.0.0.1:9"


@contextmanager
def environment(home, url, offline=False):
    """What huggingface_hub reads of HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        patch.setattr(constants, "ENDPOINT", url)
        files = url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        patch.setattr(constants, "HF_HUB_OFFLINE", offline)
        yield


def fetch(home, url, source, kind="model", offline=False):
    """({file: content} of the snapshot, its commit)."""
    with environment(home, url, offline):
        folder, commit = hub.fetch(source, kind, "the embedded ones")
        assert hub.cached_revision(source, kind) == commit
    return contents(folder), commit


def refused(words, *arguments, **more):
    """A fetch that has to end with one line which has these words."""
    with pytest.raises(SystemExit) as stop:
        fetch(*arguments, **more)
    assert "\n" not in str(stop.value)
    for word in words:
        assert word in str(stop.value)


def cache(home, url, source, *files):
    """Download files one by one, as transformers does."""
    with environment(home, url):
        for file in files:
            hf_hub_download(source, file)


def contents(folder):
    return {path: file.read_bytes() for path, file in files_of(Path(folder)).items()}


def write(folder, **files):
    """A repository with these files besides the usual ones; a number stands for weights filled with it."""
    for name, content in {"config.json": "{}", "tokenizer.json": "{}", "README.md": "", **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            save_file({"weight": np.full((4, 4), content, np.float32)}, path)
        else:
            path.write_text(content)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("repositories")
    parts = {f"model-0000{part}-of-00002.safetensors": part for part in (1, 2)}
    index = json.dumps({"weight_map": {str(tensor): part for part, tensor in parts.items()}})
    kept = {"modules.json": "[]", "1_Pooling/config.json": "{}",
            "vocab.txt": "", "chat_template.jinja": "", "spiece.model": "", "model.safetensors": 1}
    left = ("pytorch_model.bin", "modeling_own.py", "onnx/model.onnx", "onnx/config.json", "model.gguf",
            "openvino/openvino_model.bin", "original/params.json", "consolidated.safetensors", "tf_model.h5",
            "flax_model.msgpack", "training_args.bin", "checkpoint-1/pytorch_model.bin")
    return {"plain": write(root / "plain", **{"model.safetensors": 1}),
            "newer": write(root / "newer", **{"model.safetensors": 2}),
            "large": write(root / "large", **{"model.safetensors": "x" * 200_000}),
            "sharded": write(root / "sharded", **parts, **{"model.safetensors.index.json": index}),
            "encoder": write(root / "encoder", **kept, **dict.fromkeys(left, "")),
            "old": write(root / "old", **{"pytorch_model.bin": "old", "model.gguf": ""}),
            "partly": write(root / "partly", **{"model.safetensors": 1, "2_Dense/pytorch_model.bin": ""}),
            "gguf": write(root / "gguf", **{"model.gguf": "", "run.py": ""})}


def test_ids(monkeypatch, tmp_path):
    assert hub.parse("owner/name") == ("owner/name", None)
    assert hub.parse("owner/name@refs/pr/1") == ("owner/name", "refs/pr/1")
    for source in ("owner/name", "owner/name.v1-x_y", "o/n@v1.0", "o/n@refs/pr/1", f"o/n@{40 * 'a'}"):
        assert hub.is_id(source), source
    for source in ("", "name", "a/b/c", "./name", "/name", "~/name", "../x", "o/n.git", "o/a--b", "o/a..b",
                   "o/-n", "o/n m", "o/имя", "o/n@../x", "o/n@/x"):
        assert not hub.is_id(source), source
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not hub.is_id("owner/name")


def python(code, home, url, before=()):
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home)}
    return subprocess.run([*before, sys.executable, "-c", code], cwd=results.ROOT, env=env,
                          capture_output=True, text=True, check=False)


def test_asking_for_the_cached_revision_loads_nothing_large(tmp_path):
    done = python("import sys\nfrom sources import hub\nassert hub.cached_revision('o/m') is None\n"
                  "print(*{'torch', 'transformers', 'httpx2', 'tqdm', 'yaml', 'numpy'} & set(sys.modules))",
                  tmp_path, REFUSED)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_what_is_downloaded(folders, tmp_path, capsys):
    left = {"plain": set(), "sharded": set()}
    left["encoder"] = contents(folders["encoder"]).keys() - {
        "README.md", "1_Pooling/config.json", "chat_template.jinja",
        "config.json", "model.safetensors", "modules.json", "spiece.model", "tokenizer.json", "vocab.txt"}
    with Hub({f"o/{name}": folders[name] for name in left}) as url:
        for name, unwanted in left.items():
            everything, commit = contents(folders[name]), commit_of(folders[name])
            wanted = {path: everything[path] for path in everything.keys() - unwanted}
            assert fetch(tmp_path, url, f"o/{name}") == (wanted, commit), name
            said = rf"downloading o/{name}@{commit[:12]} \(0\.0 MB\) \.\.\.\n"
            assert re.fullmatch(said, capsys.readouterr().out)


def test_a_full_cache_needs_no_hub(folders, tmp_path, capsys):
    server = Hub({"o/m": folders["plain"]})
    with server as url:
        first = fetch(tmp_path, url, "o/m")
        server.requests.clear()
        capsys.readouterr()
        for source in ("o/m", f"o/m@{first[1]}"):
            assert fetch(tmp_path, url, source) == first
        assert (server.requests, capsys.readouterr().out) == ([], "")
    assert fetch(tmp_path, url, "o/m") == first  # the server is gone
    assert fetch(tmp_path, url, "o/m", offline=True) == first


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_a_partial_cache_is_completed(folders, tmp_path, name):
    with Hub({"o/m": folders[name]}) as url:
        cache(tmp_path, url, "o/m", "config.json", "tokenizer.json")
        refused(["MODEL=o/m: no hub answers", REFUSED, "the embedded ones"], tmp_path, REFUSED, "o/m")
        refused(["MODEL=o/m: HF_HUB_OFFLINE", "embedded"], tmp_path, url, "o/m", offline=True)
        files, commit = fetch(tmp_path, url, "o/m")
    assert commit == commit_of(folders[name])
    assert files.keys() == contents(folders[name]).keys()


def test_files_cached_one_by_one_serve_where_no_hub_answers(folders, tmp_path, capsys):
    with Hub({"o/m": folders["sharded"]}) as url:
        *rest, last = sorted(contents(folders["sharded"]), key=lambda path: path.startswith("model-00002"))
        cache(tmp_path, url, "o/m", *rest)
        refused(["MODEL=o/m: no hub answers"], tmp_path, REFUSED, "o/m")  # as long as one is lacking
        cache(tmp_path, url, "o/m", last)
    assert fetch(tmp_path, REFUSED, "o/m") == (contents(folders["sharded"]), commit_of(folders["sharded"]))
    assert "no hub answers" in (said := capsys.readouterr().out)
    assert "going on with the files in the cache" in said


def test_revisions(folders, tmp_path):
    branches = {"main": "plain", "v1": "sharded", "refs/pr/1": "encoder", "newer": "newer"}
    repository = Repository({branch: folders[name] for branch, name in branches.items()})
    with Hub({"o/m": repository}) as url:
        newer = commit_of(folders["newer"])
        wanted = {"@v1": "sharded", "@refs/pr/1": "encoder", f"@{newer}": "newer", "": "plain"}
        for revision, name in wanted.items():
            assert fetch(tmp_path, url, f"o/m{revision}")[1] == commit_of(folders[name]), revision
        refused(["MODEL=o/m@v9: the hub has no revision v9", f"{url}/o/m/"], tmp_path, url, "o/m@v9")
        repository.revisions["main"] = folders["newer"]
        assert fetch(tmp_path, url, "o/m")[1] == commit_of(folders["plain"])  # the cached one stays
        assert fetch(tmp_path / "other", url, "o/m")[1] == commit_of(folders["newer"])


def test_a_cut_download_goes_on_at_the_same_commit(folders, tmp_path):
    repository = Repository({"main": folders["sharded"], "before": folders["sharded"]},
                            cut={"model-00002-of-00002.safetensors": [60, 1]})
    with Hub({"o/m": repository}) as url:
        refused(["MODEL=o/m: the download broke off", "repeat the command"], tmp_path, url, "o/m")
        repository.revisions["main"] = folders["newer"]
        files, commit = fetch(tmp_path, url, "o/m")
    assert commit == commit_of(folders["sharded"])
    assert files == contents(folders["sharded"])


def test_refusals(folders, tmp_path, monkeypatch):
    moved = Repository({"main": folders["plain"]})
    models = {"o/gated": Repository({"main": folders["plain"]}, gated="hf_member"), "o/gguf": folders["gguf"],
              "o/moved": moved, "o/old": folders["old"], "o/partly": folders["partly"]}
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with Hub(models) as url:
        for token in (None, "hf_stranger"):
            if token:
                monkeypatch.setenv("HF_TOKEN", token)
            refused(["MODEL=o/x: no such path here", "hf auth login"], tmp_path, url, "o/x")
            refused(["MODEL=o/gated: ", f"{url}/o/gated", "hf auth"], tmp_path, url, "o/gated")
        monkeypatch.setenv("HF_TOKEN", "hf_member")
        assert "model.safetensors" in fetch(tmp_path, url, "o/gated")[0]
        refused(["MODEL=o/gguf: ", "no weights", ".gguf, .json, .md, .py"], tmp_path, url, "o/gguf")
        for name, file in (("old", "pytorch_model.bin"), ("partly", "2_Dense/pytorch_model.bin")):
            refused([f"MODEL=o/{name}: {file} is a pickle", "safetensors"], tmp_path, url, f"o/{name}")
        cache(tmp_path, url, "o/moved", "config.json")
        moved.revisions["main"] = folders["newer"]  # and the commit that was cached is gone
        refused(["MODEL=o/moved: the hub has no revision", "s--o--moved"], tmp_path, url, "o/moved")


def test_no_answer_is_a_matter_of_seconds(folders, tmp_path, monkeypatch):
    assert hub.ANSWER < 5
    monkeypatch.setattr(hub, "ANSWER", 0.3)
    # with telemetry, the default, the library first asks the hub something else, for up to 3 seconds
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    quiet = Hub({"o/m": folders["plain"]}, silent=True)
    partly = Hub({"o/m": Repository({"main": folders["plain"]}, silent=True)})
    with quiet as silent, partly as half:
        for url in (REFUSED, silent, half):
            start = time.monotonic()
            refused(["MODEL=o/m: no hub answers", url, "the embedded ones"], tmp_path, url, "o/m")
            assert time.monotonic() - start < 0.3 + 0.5
        refused(["MODEL=o/m: HF_HUB_OFFLINE is set", "embedded"], tmp_path, half, "o/m", offline=True)
    assert quiet.requests and partly.requests


def test_full_disk(folders, tmp_path):
    mount = f'mount -t tmpfs -o size=64k none {tmp_path} && exec "$0" "$@"'
    small = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount)
    if not shutil.which("unshare") or subprocess.run([*small, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no file system of 64 kB can be mounted here")
    with Hub({"o/m": folders["large"]}) as url:
        done = python("from sources import hub\nhub.fetch('o/m')", tmp_path, url, before=small)
    one_line(done, "MODEL=o/m: disk full", str(tmp_path), "repeat")


def test_data_sets(tmp_path, monkeypatch):
    rows = [{"text": f"row {i}"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, file in (("jsonl", "train.jsonl"), ("parquet", "data/train-0.parquet"), ("code", "load.py")):
        (tmp_path / name / file).parent.mkdir(parents=True)
        (tmp_path / name / "README.md").touch()
        (tmp_path / name / "load.py").touch()
    (tmp_path / "jsonl" / "train.jsonl").write_text(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "parquet/data/train-0.parquet")
    home = tmp_path / "home"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", home / "datasets")
    with Hub(datasets={f"o/{name}": tmp_path / name for name in ("jsonl", "parquet", "code")}) as url:
        for name, file in (("jsonl", "train.jsonl"), ("parquet", "data/train-0.parquet")):
            files, commit = fetch(home, url, f"o/{name}", "dataset")
            assert (files.keys(), commit) == ({"README.md", file}, commit_of(tmp_path / name))
        refused(["DATA=o/code: ", "no .parquet .jsonl", ".md, .py"], home, url, "o/code", "dataset")
        refused(["DATA=o/x: no such path here", "dataset"], home, url, "o/x", "dataset")
    for name in ("jsonl", "parquet"):
        with environment(home, url, offline=True):
            assert data.read_table(f"o/{name}", (("text",),), 3) == rows
            with pytest.raises(SystemExit, match="expected columns prompt"):
                data.read_table(f"o/{name}", (("prompt",),), 3)
