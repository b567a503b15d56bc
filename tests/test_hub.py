"""Models and data sets from a small local hub: what is downloaded, what is kept, what goes wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors.numpy import save_file

from common import hub, results
from tests.conftest import one_line
from tests.hub_server import Hub, Repository, commit_of, files_of

FETCH = """import json, sys, time
from common import hub
source, kind = sys.argv[1:]
start = time.monotonic()
try:
    folder, commit = hub.fetch(source, kind, "the embedded ones")
finally:
    print(time.monotonic() - start)
assert hub.cached_revision(source, kind) == commit
print(json.dumps([str(folder), commit]))"""
CACHE = """import sys
from huggingface_hub import hf_hub_download
for name in sys.argv[2:]:
    hf_hub_download(sys.argv[1], name)"""
LOAD = """import sys, datasets
from common import hub
print(datasets.load_dataset(str(hub.fetch(sys.argv[1], "dataset")[0]), split="train").to_list())"""
REFUSED = "http://127.0.0.1:9"


def python(code, home, url, *args, before=(), **env):
    """Run Python in a process of its own, because huggingface_hub reads its environment on import."""
    env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": str(home)} | env
    return subprocess.run([*before, sys.executable, "-c", code, *args], cwd=results.ROOT, env=env,
                          capture_output=True, text=True, check=False)


def fetch(home, url, source, kind="model", **rest):
    return python(FETCH, home, url, source, kind, **rest)


def contents(folder):
    return {path: file.read_bytes() for path, file in files_of(Path(folder)).items()}


def fetched(done):
    """({file: content} of the snapshot, its commit) from a fetch that has to have gone well."""
    assert done.returncode == 0, done.stderr
    folder, commit = json.loads(done.stdout.splitlines()[-1])
    return contents(folder), commit


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
    kept = {"modules.json": "[]", "1_Pooling/config.json": "{}", "2_Dense/pytorch_model.bin": "only",
            "vocab.txt": "", "chat_template.jinja": "", "spiece.model": "", "model.safetensors": 1}
    left = ("pytorch_model.bin", "modeling_own.py", "onnx/model.onnx", "onnx/config.json", "model.gguf",
            "openvino/openvino_model.bin", "original/params.json", "consolidated.safetensors", "tf_model.h5",
            "flax_model.msgpack", "training_args.bin")
    return {"plain": write(root / "plain", **{"model.safetensors": 1}),
            "newer": write(root / "newer", **{"model.safetensors": 2}),
            "large": write(root / "large", **{"model.safetensors": "x" * 200_000}),
            "sharded": write(root / "sharded", **parts, **{"model.safetensors.index.json": index}),
            "encoder": write(root / "encoder", **kept, **dict.fromkeys(left, "")),
            "old": write(root / "old", **{"pytorch_model.bin": "old", "model.gguf": ""}),
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


def test_asking_for_the_cached_revision_loads_nothing_large(tmp_path):
    done = python("import sys\nfrom common import hub\nassert hub.cached_revision('o/m') is None\n"
                  "print(*{'torch', 'transformers', 'httpx2', 'tqdm', 'yaml', 'numpy'} & set(sys.modules))",
                  tmp_path, REFUSED)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_what_is_downloaded(folders, tmp_path):
    left = {"plain": {"README.md"}, "sharded": {"README.md"}, "old": {"README.md", "model.gguf"}}
    left["encoder"] = contents(folders["encoder"]).keys() - {
        "1_Pooling/config.json", "2_Dense/pytorch_model.bin", "chat_template.jinja", "config.json",
        "model.safetensors", "modules.json", "spiece.model", "tokenizer.json", "vocab.txt"}
    with Hub({f"o/{name}": folders[name] for name in left}) as url:
        for name, unwanted in left.items():
            done = fetch(tmp_path, url, f"o/{name}")
            everything, commit = contents(folders[name]), commit_of(folders[name])
            wanted = {path: everything[path] for path in everything.keys() - unwanted}
            assert fetched(done) == (wanted, commit), name
            assert re.match(rf"downloading o/{name}@{commit[:12]} \(0\.0 MB\) \.\.\.\n", done.stdout)
            assert done.stderr == ""  # progress bars are for terminals


def test_a_full_cache_needs_no_hub(folders, tmp_path):
    server = Hub({"o/m": folders["plain"]})
    with server as url:
        first = fetched(fetch(tmp_path, url, "o/m"))
        server.requests.clear()
        for source in ("o/m", f"o/m@{first[1]}"):
            done = fetch(tmp_path, url, source)
            assert fetched(done) == first
            assert "downloading" not in done.stdout
        assert server.requests == []
    assert fetched(fetch(tmp_path, url, "o/m")) == first  # the server is gone
    assert fetched(fetch(tmp_path, url, "o/m", HF_HUB_OFFLINE="1")) == first


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_a_partial_cache_is_completed(folders, tmp_path, name):
    with Hub({"o/m": folders[name]}) as url:
        assert python(CACHE, tmp_path, url, "o/m", "config.json", "tokenizer.json").returncode == 0
        one_line(fetch(tmp_path, REFUSED, "o/m"), "MODEL=o/m: no hub answers", REFUSED, "the embedded ones")
        one_line(fetch(tmp_path, url, "o/m", HF_HUB_OFFLINE="1"), "MODEL=o/m: HF_HUB_OFFLINE", "embedded")
        files, commit = fetched(fetch(tmp_path, url, "o/m"))
    assert commit == commit_of(folders[name])
    assert files.keys() == contents(folders[name]).keys() - {"README.md"}


def test_files_cached_one_by_one_serve_where_no_hub_answers(folders, tmp_path):
    with Hub({"o/m": folders["sharded"]}) as url:
        *rest, last = sorted(contents(folders["sharded"]), key=lambda path: path.startswith("model-00002"))
        assert python(CACHE, tmp_path, url, "o/m", *rest).returncode == 0
        one_line(fetch(tmp_path, REFUSED, "o/m"), "MODEL=o/m: no hub answers")  # as long as one is lacking
        assert python(CACHE, tmp_path, url, "o/m", last).returncode == 0
    done = fetch(tmp_path, REFUSED, "o/m")
    assert fetched(done) == (contents(folders["sharded"]), commit_of(folders["sharded"]))
    assert "no hub answers" in done.stdout
    assert "going on with the files in the cache" in done.stdout


def test_revisions(folders, tmp_path):
    branches = {"main": "plain", "v1": "sharded", "refs/pr/1": "encoder", "old": "old"}
    repository = Repository({branch: folders[name] for branch, name in branches.items()})
    with Hub({"o/m": repository}) as url:
        old = commit_of(folders["old"])
        wanted = {"@v1": "sharded", "@refs/pr/1": "encoder", f"@{old}": "old", "": "plain"}
        for revision, name in wanted.items():
            assert fetched(fetch(tmp_path, url, f"o/m{revision}"))[1] == commit_of(folders[name]), revision
        one_line(fetch(tmp_path, url, "o/m@v9"), "MODEL=o/m@v9: the hub has no revision v9", f"{url}/o/m/")
        repository.revisions["main"] = folders["newer"]
        assert fetched(fetch(tmp_path, url, "o/m"))[1] == commit_of(folders["plain"])  # the cached one stays
        assert fetched(fetch(tmp_path / "other", url, "o/m"))[1] == commit_of(folders["newer"])


def test_a_cut_download_goes_on_at_the_same_commit(folders, tmp_path):
    repository = Repository({"main": folders["sharded"], "before": folders["sharded"]},
                            cut={"model-00002-of-00002.safetensors": [60, 1]})
    with Hub({"o/m": repository}) as url:
        one_line(fetch(tmp_path, url, "o/m"), "MODEL=o/m: the download broke off", "repeat the command")
        repository.revisions["main"] = folders["newer"]
        files, commit = fetched(fetch(tmp_path, url, "o/m"))
    assert commit == commit_of(folders["sharded"])
    assert files | {"README.md": b""} == contents(folders["sharded"])


def test_refusals(folders, tmp_path):
    moved = Repository({"main": folders["plain"]})
    models = {"o/gated": Repository({"main": folders["plain"]}, gated="hf_member"), "o/gguf": folders["gguf"],
              "o/moved": moved}
    with Hub(models) as url:
        for token in ({}, {"HF_TOKEN": "hf_stranger"}):
            one_line(fetch(tmp_path, url, "o/x", **token), "MODEL=o/x: no such path here", "hf auth login")
            one_line(fetch(tmp_path, url, "o/gated", **token), "MODEL=o/gated: ", f"{url}/o/gated", "hf auth")
        assert "model.safetensors" in fetched(fetch(tmp_path, url, "o/gated", HF_TOKEN="hf_member"))[0]
        one_line(fetch(tmp_path, url, "o/gguf"), "MODEL=o/gguf: ", "no weights", ".gguf, .json, .md, .py")
        assert python(CACHE, tmp_path, url, "o/moved", "config.json").returncode == 0
        moved.revisions["main"] = folders["newer"]  # and the commit that was cached is gone
        one_line(fetch(tmp_path, url, "o/moved"), "MODEL=o/moved: the hub has no revision", "s--o--moved")


def test_no_answer_is_a_matter_of_seconds(folders, tmp_path):
    quiet = Hub({"o/m": folders["plain"]}, silent=True)
    partly = Hub({"o/m": Repository({"main": folders["plain"]}, silent=True)})
    with quiet as silent, partly as half, ThreadPoolExecutor() as pool:
        # with telemetry, the default, the library first asks the hub something else, for up to 3 seconds
        jobs = {url: pool.submit(fetch, tmp_path / f"{number}", url, "o/m", HF_HUB_DISABLE_TELEMETRY="0")
                for number, url in enumerate((REFUSED, silent, half))}
        offline = pool.submit(fetch, tmp_path / "offline", half, "o/m", HF_HUB_OFFLINE="1").result()
    for url, job in jobs.items():
        one_line(job.result(), "MODEL=o/m: no hub answers", url, "the embedded ones")
        assert float(job.result().stdout) < 5 + 1  # the second is for the import, in three processes at once
    one_line(offline, "MODEL=o/m: HF_HUB_OFFLINE is set", "the embedded ones")
    assert quiet.requests and partly.requests


def test_full_disk(folders, tmp_path):
    mount = f'mount -t tmpfs -o size=64k none {tmp_path} && exec "$0" "$@"'
    small = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount)
    if not shutil.which("unshare") or subprocess.run([*small, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no file system of 64 kB can be mounted here")
    with Hub({"o/m": folders["large"]}) as url:
        one_line(fetch(tmp_path, url, "o/m", before=small), "MODEL=o/m: disk full", str(tmp_path), "repeat")


def test_data_sets(tmp_path):
    rows = [{"text": f"row {i}"} for i in range(3)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    jsonl = write(tmp_path / "jsonl", **{"train.jsonl": lines, "load.py": ""})
    parquet = write(tmp_path / "parquet", **{"data/train-0.parquet": ""})
    for name in ("config.json", "tokenizer.json"):
        (jsonl / name).unlink()
        (parquet / name).unlink()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet / "data" / "train-0.parquet")
    code = tmp_path / "code"
    shutil.copytree(jsonl, code, ignore=shutil.ignore_patterns("*.jsonl"))
    home = tmp_path / "home"
    with Hub(datasets={"o/jsonl": jsonl, "o/parquet": parquet, "o/code": code}) as url:
        for name, file in (("jsonl", "train.jsonl"), ("parquet", "data/train-0.parquet")):
            got, commit = fetched(fetch(home, url, f"o/{name}", "dataset"))
            assert (got.keys(), commit) == ({"README.md", file}, commit_of(tmp_path / name))
        one_line(fetch(home, url, "o/code", "dataset"), "DATA=o/code: ", "no .parquet .jsonl", ".md, .py")
        one_line(fetch(home, url, "o/x", "dataset"), "DATA=o/x: no such path here", "dataset")
    for name in ("jsonl", "parquet"):
        done = python(LOAD, home, url, f"o/{name}", HF_HUB_OFFLINE="1")
        assert done.stdout.splitlines()[-1:] == [str(rows)], done.stderr
