"""A small model hub on this machine: as much of the interface as it takes to list and download repositories.

    hub = Hub(models={"owner/name": folder}, datasets={"o/data": Repository({"main": folder, "v1": other})})
    with hub as url:
        ...  # run something with HF_ENDPOINT=url
    hub.requests  # [("GET", "/api/models/owner/name"), ...]
"""

import functools
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?")
RESOLVE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """A repository as the hub serves it; its fields may be changed while the server runs."""

    revisions: dict[str, Path]  # branch or tag -> folder; "main" is the default branch
    gated: str | None = None  # the only token that may download; the listing stays public, as on the real hub
    cut: dict[str, list[int]] = field(default_factory=dict)  # file -> [bytes until the reset, how many times]
    silent: bool = False  # accept connections and never answer

    def find(self, revision: str) -> tuple[str, Path] | None:
        """(commit, folder) of a branch, a tag or a commit."""
        if revision in self.revisions:
            return commit_of(self.revisions[revision]), self.revisions[revision]
        return {commit: (commit, folder) for folder in self.revisions.values()
                for commit in [commit_of(folder)]}.get(revision)


class Hub:
    """The server. Entering its context starts it and gives its URL. A folder stands for its main branch."""

    def __init__(self, models: dict | None = None, datasets: dict | None = None, silent: bool = False):
        given = {(kind, name): value for kind, group in (("models", models), ("datasets", datasets))
                 for name, value in (group or {}).items()}
        self.repositories = {key: value if isinstance(value, Repository) else Repository({"main": value})
                             for key, value in given.items()}
        self.silent = silent  # answer nothing at all
        self.requests: list[tuple[str, str]] = []  # (method, path) of each
        self.stopped = threading.Event()

    def __enter__(self) -> str:
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.block_on_close = False
        self.server.hub = self
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *error) -> None:
        self.stopped.set()
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers of the hub: descriptions, listings and files of repositories."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        hub.requests.append((self.command, unquote(path)))
        api, resolve = API.fullmatch(path), RESOLVE.fullmatch(path)  # in a revision, a slash is quoted
        if not (api or resolve or hub.silent):
            self.refuse(404, "NotFound")
            return
        kind, name, wish, revision = api.groups() if api else ("models", "", None, None)
        if resolve:
            kind, name, revision, file = ("datasets" if resolve[1] else "models", *resolve.groups()[1:])
        repository = hub.repositories.get((kind, name))
        if hub.silent or (repository and repository.silent):
            hub.stopped.wait()
            self.close_connection = True
        elif repository is None:  # strangers are not told whether a name is unknown or private
            self.refuse(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        elif (found := repository.find(unquote(revision or "main"))) is None:
            self.refuse(404, "RevisionNotFound")
        elif resolve:
            self.send_file(repository, *found, unquote(file))
        else:
            self.describe(name, *found, wish)

    do_HEAD = do_GET

    def describe(self, name: str, commit: str, folder: Path, wish: str | None) -> None:
        """A repository with its files, or ("tree") the list of all its files, inside folders too."""
        files = [{"type": "file", "path": path, "size": file.stat().st_size, "oid": hash_of(file)}
                 for path, file in files_of(folder).items()]
        siblings = [{"rfilename": file["path"], "size": file["size"], "blobId": file["oid"]}
                    for file in files]
        described = {"_id": commit[:24], "id": name, "sha": commit, "private": False, "gated": False,
                     "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        self.send(200, files if wish == "tree" else described)

    def send_file(self, repository: Repository, commit: str, folder: Path, path: str) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        file = files_of(folder).get(path)
        if repository.gated and token != repository.gated:
            self.refuse(403 if token else 401, "GatedRepo")
        elif file is None:
            self.refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
        else:
            content = file.read_bytes()
            headers = {"ETag": f'"{sha1(content)}"', "X-Repo-Commit": commit}
            limit = repository.cut.get(path, [0, 0])
            stop = limit[0] if limit[1] > 0 and self.command == "GET" else None
            limit[1] -= stop is not None
            self.send(200, content, headers, stop)

    def refuse(self, status: int, code: str, headers: dict | None = None) -> None:
        self.send(status, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code} | (headers or {}))

    def send(self, status: int, content, headers: dict | None = None, stop: int | None = None) -> None:
        """Send bytes, or anything else as JSON; after `stop` bytes the connection is reset."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:stop])
        if stop is not None:
            linger = struct.pack("ii", 1, 0)  # to close is then to reset
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            os.close(self.connection.detach())
            self.close_connection = True

    def log_message(self, *message) -> None:
        """Nothing on the terminal: the requests are in Hub.requests."""


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def hash_of(file: Path) -> str:
    return hashed(file, file.stat().st_mtime_ns)


@functools.cache
def hashed(file: Path, time: int) -> str:
    """Once per state of a file: a large model would take longer to hash than a client waits."""
    return sha1(file.read_bytes())


def files_of(folder: Path) -> dict[str, Path]:
    return {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}


def commit_of(folder: Path) -> str:
    """The commit of a folder follows from its content."""
    hashes = {path: hash_of(file) for path, file in files_of(folder).items()}
    return sha1(json.dumps(hashes).encode())
