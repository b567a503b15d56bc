"""Models and data sets of a hub: found in the local cache or downloaded whole, always at one known commit.

Light on purpose, because the freshness check asks for `cached_revision`: huggingface_hub is imported inside
the functions, and only its constants (10 ms) until files are wanted.
"""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import re
import sys
import threading
from pathlib import Path

ANSWER = 4  # seconds until a hub that does not answer counts as unreachable
NAME = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]{0,94}\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
REVISION = re.compile(r"(?!.*\.\.)\w[\w./+-]*", re.ASCII)
TABLES = [f".{name}{packed}" for packed in ("", ".gz", ".zst")
          for name in ("parquet", "jsonl", "json", "csv", "txt", "arrow")]
CONTENT = {"model": (".safetensors", ".bin"), "dataset": tuple(TABLES)}  # of no use without any of these
WANTED = {"model": ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.safetensors",
                    "*pytorch_model*.bin"],
          "dataset": ["README.md", *(f"*{suffix}" for suffix in TABLES)]}  # no *.py: other people's code
UNWANTED = {"model": ["onnx/*", "openvino/*", "original/*", "coreml/*", "checkpoint*/*", "*consolidated*"],
            "dataset": []}


def parse(source: str) -> tuple[str, str | None]:
    """Split "owner/name@revision" into the name and the revision, which is None if it is not given."""
    name, _, revision = source.partition("@")
    return name, revision or None


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


def fetch(source: str, kind: str = "model", choices: str = "a local folder") -> tuple[Path, str]:
    """The folder with the files of a "model" or a "dataset", and its commit. Missing files are downloaded.

    A commit in the cache stays the one used, even if the hub has moved on. SystemExit with one line if the
    files cannot be had; where no hub answers, the line ends with `choices`: what else to use.
    """
    from huggingface_hub import constants, get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HTTPError
    commit, revision = cached_revision(source, kind), parse(source)[1]
    folder = cache_folder(source, kind) / "snapshots" / str(commit)
    try:
        tree = get_cached_repo_tree(parse(source)[0], repo_type=kind, revision=commit or revision)
        files = select([file.path for file in tree], source, kind)[0]
        whole = all((folder / file).is_file() for file in files)
    except CachedRepoTreeNotFoundError:  # nothing or single files: only the hub knows what is missing
        whole = None
    if whole:
        return folder, commit
    try:
        info = ask(parse(source)[0], kind, commit or revision)
    except (OSError, HTTPError, json.JSONDecodeError) as err:
        failed = f"no hub answers at {constants.ENDPOINT}"
        why = reason(err, source, kind, failed, f"try again, or use {choices}")
        if kind == "dataset" or whole is False or not loadable(folder):
            raise SystemExit(why) from None
        print(f"{why}; going on with the files in the cache, commit {commit[:12]}", flush=True)
        return folder, commit
    return download(info, source, kind), info.sha


def download(info, source: str, kind: str) -> Path:
    """Complete the snapshot that the hub's description `info` is about, and return its folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import disable_progress_bars
    (name, revision), cache = parse(source), cache_folder(source, kind)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    files, unwanted = select(list(sizes), source, kind)
    folder = cache / "snapshots" / info.sha
    size = sum(sizes[file] for file in files if not (folder / file).is_file())
    shown = f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
    print(f"downloading {name}@{info.sha[:12]} ({shown}) ...", flush=True)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        if cached_revision(source, kind) is None and revision != info.sha:
            ref = cache / "refs" / (revision or "main")  # before the files: a repeated command wants the same
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(info.sha)
        snapshot_download(name, repo_type=kind, revision=info.sha, allow_patterns=WANTED[kind],
                          ignore_patterns=unwanted)
    except (OSError, HTTPError, RuntimeError) as err:  # RuntimeError: Xet, the hub's own transfer protocol
        remedy = "repeat the command, it goes on after the files that are complete"
        raise SystemExit(reason(err, source, kind, "the download broke off", remedy)) from None
    return folder


def select(listing: list[str], source: str, kind: str) -> tuple[list[str], list[str]]:
    """The files wanted of a repository, and patterns of those to leave. SystemExit without weights or data.

    A pytorch_model*.bin is left if its folder has safetensors. The rule is by folder because a transformer
    may come in both formats and the dense layer after it only in the old one.
    """
    from huggingface_hub.utils import filter_repo_objects
    found = filter_repo_objects(listing, allow_patterns=WANTED[kind], ignore_patterns=UNWANTED[kind])
    files = list(found)
    safe = {os.path.dirname(file) for file in files if file.endswith(".safetensors")}
    twins = [file for file in files if file.endswith(".bin") and os.path.dirname(file) in safe]
    if not any(file.endswith(CONTENT[kind]) for file in files):
        has = ", ".join(sorted({Path(file).suffix or file for file in listing})) or "no files"
        lacks = "weights (*.safetensors, pytorch_model*.bin)" if kind == "model" else " ".join(TABLES[:6])
        raise SystemExit(f"{label(source, kind)}: the repository has no {lacks}, only {has}: use another one")
    return [file for file in files if file not in twins], [*UNWANTED[kind], *twins]


def loadable(folder: Path) -> bool:
    """Whether a snapshot has a configuration and weights, with every part that their index names."""
    found = list(folder.glob("*.safetensors.index.json")) or list(folder.glob("*.index.json"))
    indices = [json.loads(path.read_text()) for path in found]
    parts = {part for index in indices for part in index["weight_map"].values()}
    parts = parts or {file.name for file in folder.glob("model.safetensors")} or {"pytorch_model.bin"}
    return all((folder / file).is_file() for file in ("config.json", *parts))


def ask(name: str, kind: str, revision: str | None):
    """The hub's description of a repository; an error if it takes longer than ANSWER seconds.

    This waits for a thread: the time limit of a socket holds for each request and for each address of a host,
    and not for finding the addresses.
    """
    from huggingface_hub import HfApi
    answer = concurrent.futures.Future()

    def work():
        try:
            answer.set_result(HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=ANSWER,
                                                files_metadata=True))
        except Exception as err:  # answer.result() raises it in the thread that waits
            answer.set_exception(err)
    threading.Thread(target=work, daemon=True).start()
    if not concurrent.futures.wait([answer], ANSWER).done:
        raise TimeoutError
    return answer.result()


def label(source: str, kind: str) -> str:
    """The setting as it was typed."""
    return f"{'MODEL' if kind == 'model' else 'DATA'}={source}"


def reason(err: Exception, source: str, kind: str, failed: str, remedy: str) -> str:
    """One line about an error; `failed` and `remedy` are for errors that say nothing more precise."""
    from huggingface_hub import constants, errors
    (name, revision), commit = parse(source), cached_revision(source, kind)
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{name}"
    status = err.response.status_code if isinstance(err, errors.HfHubHTTPError) else None
    if isinstance(err, errors.OfflineModeIsEnabled):
        text = f"HF_HUB_OFFLINE is set and the cache lacks files of it: unset HF_HUB_OFFLINE, {remedy}"
    elif isinstance(err, errors.GatedRepoError):
        text = f"its owners grant access on request: ask on {page}, then log in with 'hf auth login'"
    elif isinstance(err, errors.RevisionNotFoundError):
        text = f"the hub has no revision {commit or revision} of it: see {page}/tree/main"
        text += f"; what the cache has of it may go: {cache_folder(source, kind)}" if commit else ""
    elif status in (401, 403, 404):
        text = f"no such path here or {kind} on the hub: check the spelling, if private 'hf auth login'"
    elif getattr(err, "errno", None) == errno.ENOSPC or "No space left" in str(err):
        text = f"disk full: free space at {constants.HF_HUB_CACHE} or set HF_HOME, then repeat the command"
    elif getattr(err, "errno", None):
        raise err
    else:
        text = f"{failed} ({f'HTTP {status}' if status else type(err).__name__}): {remedy}"
    return f"{label(source, kind)}: {text}"
