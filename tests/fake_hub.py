# Copyright 2026 The medst_trl authors.
# SPDX-License-Identifier: Apache-2.0
"""
A fake Hub on localhost with the routes that huggingface_hub and datasets call: public and private repositories with
commits and branches, LFS uploads, range downloads, and tokens with and without write access.

huggingface_hub reads the endpoint when it is imported, so clients run in separate processes, see [`client`].
"""

import base64
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


WRITER, READER, EXPIRED = "hf_writer0123456789abcdef", "hf_reader0123456789abcdef", "hf_expired0123456789abcdef"
LFS_SUFFIXES = (".parquet", ".safetensors")


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by revision
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        content = repr((len(self.commits), sorted(files), message)).encode()
        revision = hashlib.sha1(content).hexdigest()
        self.commits[revision] = files
        self.branches[branch] = revision
        self.messages.append(message)
        return revision

    def resolve(self, revision: str) -> str | None:
        revision = self.branches.get(revision, revision)
        return revision if revision in self.commits else None


@dataclass
class FakeHub:
    """
    Contents of the Hub and the calls that it received.

    Attributes:
        repositories: By (`"model"` or `"dataset"`, `"org/name"`).
        objects: LFS objects by SHA-256.
        uploads: SHA-256 of the uploaded LFS objects, in order.
        calls: `"METHOD path"` of each call.
        broken_after: Number of LFS uploads after which the Hub drops connections, or None.
        failing: Status of all replies, or None.
        uploading: Held while an LFS upload is stored and counted.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    broken_after: int | None = None
    failing: int | None = None
    uploading: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def add(self, kind: str, repo_id: str, files: dict[str, bytes], private: bool = True) -> None:
        repository = self.repositories[kind, repo_id] = Repository(private)
        repository.commit("main", {}, "initial commit")
        if files:
            repository.commit("main", files, "add files")

    def files(self, kind: str, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        repository = self.repositories[kind, repo_id]
        return repository.commits[repository.resolve(revision)]


@contextmanager
def serve_hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def client(
    hub_url: str,
    home: Path,
    *command: str,
    token: str | None = WRITER,
    check: bool = True,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a Python command (`"-m", "medst_trl", ...` or `"-c", code`) with this Hub and its own caches."""
    # Drop the Hub settings of this process, such as tokens, caches and offline mode.
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    settings |= {"HF_ENDPOINT": hub_url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    settings |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    settings |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, *command], env=settings | environment, capture_output=True, text=True, timeout=120, cwd=cwd
    )
    assert not check or done.returncode == 0, done.stderr
    return done


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urlsplit(self.path)
        path, self.query = unquote(address.path), parse_qs(address.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.calls.append(f"{self.command} {path}")
        if self.hub.failing:
            return self._send(self.hub.failing, {"error": "try later"})
        if self._token() == EXPIRED:
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        for method, pattern, handle in _ROUTES:
            if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                return handle(self, **match.groupdict())
        return self._send(404, {"error": f"no such route: {path}"})

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _may_write(self) -> bool:
        if self._token() == WRITER:
            return True
        if self._token() is None:
            self._send(401, {"error": "Invalid username or password."})
        else:
            self._send(403, {"error": "Forbidden: you must use a write token to upload to a repository."})
        return False

    def _repository(self, kind: str, repo_id: str) -> Repository | None:
        repository = self.hub.repositories.get((kind.strip("/").removesuffix("s"), repo_id))
        if repository is None or (repository.private and self._token() not in (WRITER, READER)):
            self._send(
                404 if self._token() else 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
            )
            return None
        return repository

    def _files(self, kind: str, repo_id: str, revision: str) -> tuple[Repository, str] | None:
        if (repository := self._repository(kind, repo_id)) is None:
            return None
        if (commit := repository.resolve(revision)) is None:
            self._send(404, {"error": "no such revision"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return repository, commit

    # One method per route.

    def create(self) -> None:
        if not self._may_write():
            return
        request = json.loads(self.body)
        kind, repo_id = request.get("type") or "model", f"{request.get('organization') or 'me'}/{request['name']}"
        url = f"{self.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.hub.repositories:
            return self._send(409, {"error": "You already created this repo", "url": url})
        private = request.get("private") or request.get("visibility") == "private"
        self.hub.add(kind, repo_id, {}, bool(private))
        return self._send(200, {"url": url})

    def validate(self) -> None:
        self._send(200, {"warnings": [], "errors": []})

    def whoami(self) -> None:
        self._send(200, {"type": "user", "name": "me", "orgs": []})

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> None:
        if (found := self._files(kind, repo_id, revision or "main")) is None:
            return
        repository, commit = found
        self._send(
            200,
            {
                "id": repo_id, "modelId": repo_id, "sha": commit, "private": repository.private, "tags": [],
                "siblings": [{"rfilename": name} for name in repository.commits[commit]], "downloads": 0, "likes": 0,
                "lastModified": "2026-11-21T00:00:00.000Z", "createdAt": "2026-11-21T00:00:00.000Z", "gated": False,
                "disabled": False,
            },
        )  # fmt: skip

    def branch(self, kind: str, repo_id: str, revision: str) -> None:
        if self._may_write() and (repository := self._repository(kind, repo_id)):
            repository.branches[revision] = repository.branches["main"]
            self._send(200, {})

    def preupload(self, kind: str, repo_id: str, revision: str) -> None:
        if not self._may_write() or (found := self._files(kind, repo_id, revision)) is None:
            return
        files = found[0].commits[found[1]]
        answers = []
        for file in json.loads(self.body)["files"]:
            name = file["path"]
            mode = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            answers.append(
                {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": _oid(name, files.get(name))}
            )
        self._send(200, {"files": answers})

    def batch(self, kind: str, repo_id: str) -> None:
        if not self._may_write():
            return
        objects = []
        for item in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}"}}
            entry = {"oid": item["oid"], "size": item["size"]}
            objects.append(entry if item["oid"] in self.hub.objects else entry | {"actions": upload})
        self._send(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})

    def put(self, oid: str) -> None:
        with self.hub.uploading:  # the library uploads from several threads
            if self.hub.broken_after is not None and len(self.hub.uploads) >= self.hub.broken_after:
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            assert hashlib.sha256(self.body).hexdigest() == oid
            self.hub.objects[oid] = self.body
            self.hub.uploads.append(oid)
        return self._send(200)

    def commit(self, kind: str, repo_id: str, revision: str) -> None:
        if not self._may_write() or (found := self._files(kind, repo_id, revision)) is None:
            return
        repository, head = found
        files, message = dict(repository.commits[head]), ""
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(revision, files, message)
        url = f"{self.hub.url}/{repo_id}/commit/{commit}"
        self._send(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def tree(self, kind: str, repo_id: str, revision: str, directory: str | None = None) -> None:
        if (found := self._files(kind, repo_id, revision)) is None:
            return
        files, prefix = found[0].commits[found[1]], f"{directory}/" if directory else ""
        below = {name: content for name, content in files.items() if name.startswith(prefix)}
        if directory and not below:
            return self._send(404, {"error": "no such directory"}, {"X-Error-Code": "EntryNotFound"})
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = [
            _entry(name, content) for name, content in below.items() if recursive or "/" not in name[len(prefix) :]
        ]
        directories = {prefix + name[len(prefix) :].split("/")[0] for name in below if "/" in name[len(prefix) :]}
        entries += [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in sorted(directories)]
        return self._send(200, entries)

    def paths_info(self, kind: str, repo_id: str, revision: str) -> None:
        if (found := self._files(kind, repo_id, revision)) is None:
            return
        body = self.body.decode()
        names = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        files = found[0].commits[found[1]]
        self._send(200, [_entry(name, files[name]) for name in names if name in files])

    def resolve(self, kind: str | None, repo_id: str, revision: str, name: str) -> None:
        if (found := self._files(kind or "model", repo_id, revision)) is None:
            return
        content = found[0].commits[found[1]].get(name)
        headers = {"X-Repo-Commit": found[1], "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if content is None:
            return self._send(404, {"error": "no such file"}, headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(requested[1]), int(requested[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self._send(206, content[start : end + 1], headers)
        return self._send(200, content, headers)

    def _send(self, status: int, content: object = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _oid(name: str, content: bytes | None) -> str | None:
    """Return the git object id of a file, or the SHA-256 of its content for LFS files."""
    if content is None:
        return None
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _oid(name, content)}
    lfs = {"oid": entry["oid"], "size": len(content), "pointerSize": 134}
    return entry | ({"lfs": lfs} if name.endswith(LFS_SUFFIXES) else {})


_API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", rf"{_API}/branch/(?P<revision>.+)", _Handler.branch),
    ("POST", rf"{_API}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"{_API}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", rf"{_API}/paths-info/(?P<revision>.+)", _Handler.paths_info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<directory>.+))?", _Handler.tree),
    ("GET", rf"{_API}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("POST", r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]+)", _Handler.put),
    (
        "GET",
        r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)",
        _Handler.resolve,
    ),
)
