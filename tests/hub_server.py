"""A Hugging Face Hub on loopback: the real huggingface_hub client talks to it as it does to the real Hub.

Two listeners on 127.0.0.1: the Hub (API and /resolve) and its CDN, where /resolve sends LFS files by a 302.
The CDN goes by another host name ("localhost"), as in the world: within one host the client would follow the
redirect of a HEAD, past the headers that it looks for, and keep its token.
`*.safetensors` are LFS files (etag: sha256 of the content), all others plain (etag: git blob sha1). No Xet.

A commit is the content of a folder at the time of `add_repo` or `move_branch`, or what a client committed; its hash
follows from names and contents alone. Files are read again when served: do not change them under a running server.

Whoever has one of the `tokens` may write to the repos in that user's own namespace and to nothing else. Uploads go as
to the real Hub: preupload, the LFS batch, the CDN (which compares the digest), and a commit of NDJSON.

One surprise: the real Hub answers a stranger who asks for a missing repo by a bare 401, which the client
understands for https:// addresses only. Here the 401 carries the error code that the Hub's 404 has.
"""

import base64
import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit

import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api

Route = Literal["api", "resolve", "cdn"]

_CHUNK = 1 << 16
_DATE = "2026-01-01T00:00:00.000Z"
_WRITES = "preupload|commit|branch"
_REPO = rf"(?P<repo>[^/]+(?:/(?!(?:resolve|revision|tree|{_WRITES})/)[^/]+)?)"
_API = re.compile(rf"/api/models/{_REPO}(?:/(?P<what>revision|tree)/(?P<revision>[^/]+)(?:/(?P<file>.+))?)?")
_WRITE = re.compile(rf"/api/models/{_REPO}/(?P<what>{_WRITES})/(?P<revision>[^/]+)")
_BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/(?P<what>batch)")
_OTHER = re.compile(r"/api/(?P<what>whoami-v2|validate-yaml|repos/create)")
_RESOLVE = re.compile(rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_CDN = re.compile(r"/cdn/(?P<repo>[^/]+)/(?P<sha256>[0-9a-f]{64})/(?P<file>.+)")


@dataclass
class Request:
    """One request and its answer.

    `file` is the file's path in the repo ("" for API requests; the sha256 for what is uploaded). `range` and
    `authorization` are the headers as they came. `sent` counts body bytes handed to the network, whether or not the
    client read them, `received` those of the request's body.
    """

    method: str
    path: str
    route: Route
    repo: str = ""
    file: str = ""
    range: str | None = None
    authorization: str | None = None
    status: int = 0
    sent: int = 0
    received: int = 0


@dataclass
class Fault:
    """Something that goes wrong `times` times (None: always), after `skip` matching requests went well.

    `match` is a glob over the file's path in the repo or, for API requests, over the URL's path ("/api/*");
    `method` and `route` narrow it. Kinds:
    - "status": answers `status`, with a Retry-After header where `retry_after` (seconds) is set;
    - "broken": closes the connection after `after` bytes of what is uploaded came;
    - "cut": closes the connection after `after` bytes of a file's body; shorter bodies are left alone;
    - "reset": the same by a TCP reset, which also throws away what the client had not read yet;
    - "wrong_bytes": flips the byte at `offset` of the file; bodies without that byte are left alone.
    `hits` counts how often it happened.
    """

    kind: Literal["status", "broken", "cut", "reset", "wrong_bytes"]
    match: str = "*"
    times: int | None = 1
    skip: int = 0
    method: str | None = None
    route: Route | None = None
    status: int = 503
    retry_after: int | None = None
    after: int = 0
    offset: int = 0
    hits: int = 0
    seen: int = 0

    def concerns(self, request: Request, start: int, stop: int) -> bool:
        """Whether it can happen to this request, whose answer holds the bytes [start, stop) of the file."""
        if self.method not in (None, request.method) or self.route not in (None, request.route):
            return False
        if self.kind in ("cut", "reset") and self.after >= stop - start:
            return False
        if self.kind == "wrong_bytes" and not start <= self.offset < stop:
            return False
        return fnmatch.fnmatchcase(request.file or urlsplit(request.path).path, self.match)


@dataclass(frozen=True)
class _File:
    local: Path
    size: int
    oid: str  # git's: of the file, or of the LFS pointer that stands for it
    sha256: str | None  # of an LFS file
    pointer_size: int

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def lfs(self) -> dict[str, object] | None:
        if self.sha256 is None:
            return None
        return {"sha256": self.sha256, "size": self.size, "pointerSize": self.pointer_size}


@dataclass(frozen=True)
class _Commit:
    sha: str
    files: dict[str, _File]


@dataclass
class _Repo:
    gated: bool
    private_token: str | None
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, _Commit] = field(default_factory=dict)


@dataclass
class _Move:
    repo: str
    branch: str
    sha: str
    after: int


class HubServer:
    """Serves model repos from local folders; a context manager.

    An exception inside the server is raised again by `stop()`.
    """

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.tokens: dict[str, str] = {}  # who may write: user by token
        self.messages: list[str] = []  # of the commits that clients made
        self.ignored: set[str] = set()  # paths that a .gitignore keeps out of commits
        self._uploads = Path(tempfile.mkdtemp(prefix="hub-uploads-"))
        self._repos: dict[str, _Repo] = {}
        self._log: list[Request] = []
        self._moves: list[_Move] = []
        self._lock = threading.Lock()
        hub, cdn = _Listener(self, is_cdn=False), _Listener(self, is_cdn=True)
        self._listeners: list[_Listener] = [hub, cdn]
        self.url, self.cdn_url = hub.url, cdn.url

    def start(self) -> "HubServer":
        for listener in self._listeners:
            listener.start()
        return self

    def stop(self) -> None:
        """Hang up every connection and stop listening; a second call does nothing."""
        listeners, self._listeners = self._listeners, []
        for listener in listeners:
            listener.stop()
        shutil.rmtree(self._uploads, ignore_errors=True)
        errors = [error for listener in listeners for error in listener.errors]
        if errors:
            raise RuntimeError(f"the hub server failed: {errors[0]!r}") from errors[0]

    def __enter__(self) -> "HubServer":
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def add_repo(
        self,
        repo_id: str,
        folder: str | Path,
        revision: str = "main",
        *,
        gated: bool = False,
        private_token: str | None = None,
    ) -> str:
        """Serve `folder` as the branch `revision` and return its commit hash.

        A repo that is already there gets one more branch and keeps its access rules. With `private_token`
        the repo does not exist for whoever lacks that token. With `gated` everyone may list the repo, and
        nobody may read its files.
        """
        commit = _commit(repo_id, Path(folder))
        with self._lock:
            repo = self._repos.setdefault(repo_id, _Repo(gated, private_token))
            repo.commits[commit.sha] = commit
            repo.branches[revision] = commit.sha
        return commit.sha

    def move_branch(self, repo_id: str, branch: str, folder: str | Path, after: int = 0) -> str:
        """Point `branch` at the content of `folder` and return the new commit hash.

        The next `after` requests for this repo still find the branch where it was. The old commit stays.
        """
        commit = _commit(repo_id, Path(folder))
        with self._lock:
            self._repos[repo_id].commits[commit.sha] = commit
            self._moves.append(_Move(repo_id, branch, commit.sha, after))
            self._move_branches(None)
        return commit.sha

    def commit(self, repo_id: str, revision: str = "main") -> str:
        """The commit hash that a branch points at now."""
        with self._lock:
            return self._repos[repo_id].branches[revision]

    @property
    def log(self) -> list[Request]:
        """The requests so far, in the order of their arrival."""
        with self._lock:
            return list(self._log)

    def clear_log(self) -> None:
        with self._lock:
            self._log.clear()

    def bytes_sent(self, suffix: str = "") -> int:
        """Bytes of file content (no errors, redirects, listings) sent for files ending in `suffix`."""
        served = (request for request in self.log if request.file and request.status in (200, 206))
        return sum(request.sent for request in served if request.file.endswith(suffix))

    def client_env(self, home: str | Path) -> dict[str, str]:
        """A subprocess's environment: this one without its Hub settings and proxies, pointed at this server.

        `home` becomes HF_HOME; the cache is `home/hub`, the same that `point_client_at` sets.
        """
        kept = {name: value for name, value in os.environ.items() if not _is_client_setting(name)}
        return kept | self._settings(home)

    def _settings(self, home: str | Path) -> dict[str, str]:
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(Path(home) / "hub"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    # What follows is called by the listeners' threads.

    def _note(self, request: Request) -> None:
        with self._lock:
            self._log.append(request)
            self._move_branches(request.repo)

    def _move_branches(self, requested: str | None) -> None:
        waiting = []
        for move in self._moves:
            if move.after == 0:
                self._repos[move.repo].branches[move.branch] = move.sha
            else:
                move.after -= move.repo == requested
                waiting.append(move)
        self._moves = waiting

    def _fault(self, kinds: tuple[str, ...], request: Request, start: int = 0, stop: int = 0) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.kind not in kinds or not fault.concerns(request, start, stop):
                    continue
                fault.seen += 1
                if fault.seen > fault.skip and (fault.times is None or fault.hits < fault.times):
                    fault.hits += 1
                    return fault
        return None

    def _repo(self, repo_id: str, token: str | None) -> _Repo | None:
        with self._lock:
            repo = self._repos.get(repo_id)
        return None if repo is None or repo.private_token not in (None, token) else repo

    def _create(self, repo_id: str, private_token: str | None) -> bool:
        """Make a repo with the first commit that the Hub gives each; False if there is one."""
        with self._lock:
            if repo_id in self._repos:
                return False
        first = self._uploads / hashlib.sha1(repo_id.encode()).hexdigest()
        first.mkdir()
        (first / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
        self.add_repo(repo_id, first, private_token=private_token)
        return True

    def _keep(self, content: bytes) -> _File:
        """A plain file of a commit, by its content."""
        local = self._uploads / f"plain-{hashlib.sha256(content).hexdigest()}"
        local.write_bytes(content)
        return _File(local, len(content), _git_oid(content), None, 0)

    def _uploaded(self, sha256: str) -> Path | None:
        """Where the LFS object is, None if it was not uploaded yet."""
        local = self._uploads / sha256
        return local if local.is_file() else None

    def _add_commit(self, repo_id: str, branch: str, files: dict[str, _File], message: str) -> str:
        commit = _commit_of(repo_id, files)
        with self._lock:
            repo = self._repos[repo_id]
            repo.commits[commit.sha] = commit
            repo.branches[branch] = commit.sha
            self.messages.append(message)
        return commit.sha

    def _find(self, repo: _Repo, revision: str) -> _Commit | None:
        with self._lock:
            return repo.commits.get(repo.branches.get(revision, revision))


class _Listener(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() waits for them and the log is complete

    def __init__(self, hub: HubServer, *, is_cdn: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.is_cdn = is_cdn
        self.url = f"http://{'localhost' if is_cdn else '127.0.0.1'}:{self.server_address[1]}"
        self.errors: list[BaseException] = []
        self._open: set[Any] = set()
        self._open_lock = threading.Lock()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.ident is not None:
            self.shutdown()
            self._thread.join()
        # Idle keep-alive connections would be served (and their threads would wait) for ever.
        with self._open_lock:
            for connection in self._open:
                _hang_up(connection)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):  # clients may hang up when they like
            self.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener
    request_: Request

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        patterns: list[tuple[Route, re.Pattern[str]]] = [("resolve", _RESOLVE), ("api", _OTHER), ("api", _API)]
        if self.server.is_cdn:
            patterns = [("cdn", _CDN)]
        elif self.command == "POST":
            patterns = [("api", _BATCH), ("api", _OTHER), ("api", _WRITE)]
        route: Route
        for route, pattern in patterns:  # noqa: B007 (the last one stands for addresses nobody knows)
            if found := pattern.fullmatch(path):
                break
        self._take(route, found)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 (http.server's names); what sends a body looks at the method

    def _take(self, route: Route, found: re.Match[str] | None) -> None:
        hub = self.server.hub
        parts = {name: unquote(part) for name, part in (found.groupdict() if found else {}).items() if part}
        self.request_ = Request(
            method=self.command,
            path=self.path,
            route=route,
            repo=parts.get("repo", ""),
            file=parts.get("file", "") if route != "api" else "",
            range=self.headers["Range"],
            authorization=self.headers["Authorization"],
        )
        hub._note(self.request_)
        self._body = b""
        if self.command == "POST":  # at once: what is left unread would be taken for the next request
            self._body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.request_.received = len(self._body)
        fault = hub._fault(("status",), self.request_)
        if fault is not None:
            self.close_connection = self.command == "PUT"
            wait = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            self._refuse(fault.status, None, "Injected by the test.", wait)
        elif found is None:
            self._refuse(404, None, "Sorry, we can't find the page you are looking for.")
        elif self.command == "PUT":
            self._receive(parts)
        elif self.server.is_cdn:
            self._send_from_cdn(parts)
        elif self.command == "POST" or parts.get("what") == "whoami-v2":
            self._answer_writer(parts)
        else:
            self._answer(parts)

    def _answer(self, parts: dict[str, str]) -> None:
        hub, repo_id, route = self.server.hub, parts["repo"], self.request_.route
        authorization = self.headers["Authorization"]
        token = authorization.removeprefix("Bearer ") if authorization else None
        repo = hub._repo(repo_id, token)
        if repo is None:
            if token is None:
                return self._refuse(401, "RepoNotFound", "Invalid username or password.")
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if route == "resolve" and repo.gated:
            restricted = f"Access to model {repo_id} is restricted"
            if token is None:
                message = f"{restricted}. You must have access to it and be authenticated to access it."
                return self._refuse(401, "GatedRepo", f"{message} Please log in.")
            message = f"{restricted} and you are not in the authorized list."
            return self._refuse(403, "GatedRepo", f"{message} Visit {hub.url}/{repo_id} to ask for access.")
        revision = parts.get("revision", "main")
        commit = hub._find(repo, revision)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if route == "resolve":
            return self._resolve(repo_id, commit, parts["file"])
        if parts.get("what") == "tree":
            return self._send_tree(commit, parts.get("file", ""))
        return self._send_info(repo_id, repo, commit)

    def _answer_writer(self, parts: dict[str, str]) -> None:
        hub, what = self.server.hub, parts["what"]
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ")
        user = hub.tokens.get(token)
        if user is None:
            return self._refuse(401, None, "Invalid credentials in Authorization header")
        if what == "whoami-v2":
            return self._send_json({"type": "user", "name": user, "orgs": []})
        if what == "validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        data = json.loads(self._body) if what != "commit" else {}
        if what == "repos/create":
            return self._create_repo(user, token, data)
        if hub._repo(parts["repo"], token) is None:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if parts["repo"].split("/")[0] != user:
            return self._refuse(403, None, "You don't have the required permissions")
        if what == "batch":
            return self._answer_batch(parts["repo"], data)
        return self._write_to(parts, data)

    def _create_repo(self, user: str, token: str, data: dict[str, Any]) -> None:
        owner = data["organization"] or user
        if owner != user:
            return self._refuse(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{data['name']}"
        if not self.server.hub._create(repo_id, token if data.get("visibility") == "private" else None):
            return self._refuse(409, None, "You already created this model repo")
        self._send_json({"url": f"{self.server.hub.url}/{repo_id}", "name": repo_id})

    def _answer_batch(self, repo_id: str, data: dict[str, Any]) -> None:
        """Where to put each LFS object; nowhere for those that are here."""
        objects = []
        for entry in data["objects"]:
            answer: dict[str, Any] = {"oid": entry["oid"], "size": entry["size"]}
            if self.server.hub._uploaded(entry["oid"]) is None:
                place = f"{self.server.hub.cdn_url}/cdn/{quote(repo_id, safe='')}/{entry['oid']}/{entry['oid']}"
                answer["actions"] = {"upload": {"href": place}}
            objects.append(answer)
        self._send_json({"transfer": "basic", "objects": objects})

    def _write_to(self, parts: dict[str, str], data: dict[str, Any]) -> None:
        """Preupload, a commit or a new branch."""
        hub, repo_id, branch = self.server.hub, parts["repo"], parts["revision"]
        with hub._lock:
            repo = hub._repos[repo_id]
        commit = hub._find(repo, "main" if parts["what"] == "branch" else branch)
        if commit is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        if parts["what"] == "branch":
            with hub._lock:
                repo.branches[branch] = commit.sha
            return self._send_json({})
        if parts["what"] == "preupload":
            modes = [_preupload(entry, commit, hub.ignored) for entry in data["files"]]
            return self._send_json({"files": modes})
        return self._take_commit(repo_id, branch, commit)

    def _take_commit(self, repo_id: str, branch: str, parent: _Commit) -> None:
        hub, files, message = self.server.hub, dict(parent.files), ""
        for line in self._body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit", parent.sha) != parent.sha:
                    return self._refuse(412, None, "A commit has happened since. Please refresh and try again.")
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "lfsFile":
                local = hub._uploaded(value["oid"])
                if local is None:
                    return self._refuse(400, None, f"LFS object {value['oid']} does not exist")
                files[value["path"]] = _lfs_file(local, value["size"], value["oid"])
            else:
                files[value["path"]] = hub._keep(base64.b64decode(value["content"]))
        sha = hub._add_commit(repo_id, branch, files, message)
        self._send_json({"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo_id}/commit/{sha}"})

    def _receive(self, parts: dict[str, str]) -> None:
        """An LFS object, which must have its digest."""
        hub, size = self.server.hub, int(self.headers["Content-Length"])
        broken = hub._fault(("broken",), self.request_)
        content = self.rfile.read(size if broken is None else broken.after)
        self.request_.received = len(content)
        if broken is not None:
            _hang_up(self.connection)
            self.close_connection = True
        elif hashlib.sha256(content).hexdigest() != parts["sha256"]:
            self._refuse(400, None, "The content does not have its digest")
        else:
            (hub._uploads / parts["sha256"]).write_bytes(content)
            self._send(200, {})

    def _send_info(self, repo_id: str, repo: _Repo, commit: _Commit) -> None:
        siblings: list[dict[str, object]] = [{"rfilename": path} for path in commit.files]
        if _is_on(self.path, "blobs"):
            for sibling, file in zip(siblings, commit.files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.oid} | ({"lfs": file.lfs} if file.lfs else {})
        info = {
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit.sha,
            "createdAt": _DATE,
            "lastModified": _DATE,
            "private": repo.private_token is not None,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        self._send_json(info)

    def _send_tree(self, commit: _Commit, folder: str) -> None:
        entries = _tree(commit, folder, recursive=_is_on(self.path, "recursive"))
        if folder and not entries:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist on the revision")
        self._send_json(entries)

    def _resolve(self, repo_id: str, commit: _Commit, path: str) -> None:
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.sha}
        if file is None:
            return self._refuse(404, "EntryNotFound", "Entry not found", headers)
        if file.sha256 is None:
            return self._send_file(file, headers)
        cdn = f"{self.server.hub.cdn_url}/cdn/{quote(repo_id, safe='')}/{file.sha256}/{quote(path)}"
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        self._send(302, headers | {"Accept-Ranges": "bytes", "Location": cdn})

    def _send_from_cdn(self, parts: dict[str, str]) -> None:
        # As with a signed address, whoever knows it may read: no token is looked at.
        hub = self.server.hub
        with hub._lock:
            repo = hub._repos.get(parts["repo"])
            commits = list(repo.commits.values()) if repo else []
        for commit in commits:
            file = commit.files.get(parts["file"])
            if file is not None and file.sha256 == parts["sha256"]:
                return self._send_file(file, {})
        return self._refuse(403, None, "AccessDenied")

    def _send_file(self, file: _File, headers: dict[str, str]) -> None:
        headers = {"ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"} | headers
        start, stop, status = 0, file.size, 200
        span = _parse_range(self.headers["Range"], file.size)
        if span is not None:
            start, stop = span
            if start >= stop:
                return self._send(416, headers | {"Content-Range": f"bytes */{file.size}"})
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
            status = 206
        self._head(status, stop - start, headers)
        if self.command == "HEAD":
            return
        hub, request = self.server.hub, self.request_
        wrong = hub._fault(("wrong_bytes",), request, start, stop)
        broken = hub._fault(("cut", "reset"), request, start, stop)
        with file.local.open("rb") as source:
            source.seek(start)
            end = stop if broken is None else start + broken.after
            while start < end:
                data = bytearray(source.read(min(_CHUNK, end - start)))
                if not data:
                    raise RuntimeError(f"{file.local} has changed under the hub server")
                if wrong is not None and start <= wrong.offset < start + len(data):
                    data[wrong.offset - start] ^= 0xFF
                self._write(data)
                start += len(data)
        if broken is not None:
            if broken.kind == "reset":
                # A linger of zero seconds makes close() send a reset.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                _hang_up(self.connection)
            self.close_connection = True

    def _send_json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _refuse(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message} | (headers or {})
        if code is not None:
            headers["X-Error-Code"] = code
        self._send(status, headers, json.dumps({"error": message}).encode())

    def _send(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self._head(status, len(body), headers)
        if self.command != "HEAD":
            self._write(body)

    def _head(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.request_.status = status
        self.send_response(status)
        for name, value in ({"Content-Length": str(length)} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def _write(self, data: bytes | bytearray) -> None:
        # Counted first: a client that has the last byte must find the log complete.
        self.request_.sent += len(data)
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: `HubServer.log` has it all."""


def _commit(repo_id: str, folder: Path) -> _Commit:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return _commit_of(repo_id, {path.relative_to(folder).as_posix(): _file(path) for path in paths})


def _commit_of(repo_id: str, files: dict[str, _File]) -> _Commit:
    files = dict(sorted(files.items()))
    digest = hashlib.sha1(repo_id.encode())
    for path, file in files.items():
        digest.update(f"\n{file.oid} {path}".encode())
    return _Commit(digest.hexdigest(), files)


def _file(local: Path) -> _File:
    size = local.stat().st_size
    with local.open("rb") as source:
        if local.suffix != ".safetensors":
            return _File(local, size, _git_oid(source.read()), None, 0)
        sha256 = hashlib.file_digest(source, "sha256").hexdigest()
    return _lfs_file(local, size, sha256)


def _lfs_file(local: Path, size: int, sha256: str) -> _File:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    return _File(local, size, _git_oid(pointer), sha256, len(pointer))


def _preupload(entry: dict[str, Any], commit: _Commit, ignored: set[str]) -> dict[str, Any]:
    """How a file is to be uploaded, and what the branch has in its place."""
    path = entry["path"]
    known = commit.files.get(path)
    mode = "lfs" if path.endswith(".safetensors") else "regular"
    return {"path": path, "uploadMode": mode, "shouldIgnore": path in ignored, "oid": known.etag if known else None}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree(commit: _Commit, folder: str, *, recursive: bool) -> list[dict[str, object]]:
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, dict[str, object]] = {}
    for path, file in commit.files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.sha} {name}".encode()).hexdigest()
            entries.setdefault(name, {"type": "directory", "oid": oid, "size": 0, "path": name})
        if recursive or len(parts) == 1:
            entries[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
            if file.sha256 is not None:
                lfs = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
                entries[path]["lfs"] = lfs
    return list(entries.values())


def _parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) asked for, empty where there are none; None: send the whole file."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
    if found is None:  # several ranges may be answered by the whole file as well
        return None
    first, last = found.groups()
    return int(first), min(int(last) + 1, size) if last else size


def _is_on(path: str, name: str) -> bool:
    return parse_qs(urlsplit(path).query).get(name, ["false"])[0].lower() in ("true", "1")


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side may have been faster
        connection.shutdown(socket.SHUT_RDWR)


def _is_client_setting(name: str) -> bool:
    name = name.upper()
    return (
        name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_"))
        or name.endswith("_PROXY")
        or name in ("TRANSFORMERS_OFFLINE", "TRANSFORMERS_CACHE", "DIFFUSERS_OFFLINE")
    )


def point_client_at(monkeypatch: pytest.MonkeyPatch, hub: HubServer, home: str | Path) -> None:
    """Point this process's huggingface_hub at `hub`, with the cache `home/hub` and without any token.

    The client read its settings when it was imported, so the constants are set as well as the environment.
    """
    home = Path(home)
    for name in list(os.environ):
        if _is_client_setting(name):
            monkeypatch.delenv(name)
    for name, value in hub._settings(home).items():
        monkeypatch.setenv(name, value)
    settings: dict[str, object] = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(home / "hub"),
        "HF_XET_CACHE": str(home / "xet"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "AGENT_HARNESSES_PATH": str(home / ".agent_harnesses.json"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_HUB_DISABLE_XET": True,
    }
    for name, setting in settings.items():
        monkeypatch.setattr(constants, name, setting)
    # model_info and the like are methods of this instance, made at import.
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    huggingface_hub.close_session()  # its proxies were read when it was opened


@contextlib.contextmanager
def running_hub(monkeypatch: pytest.MonkeyPatch, home: str | Path) -> Iterator[HubServer]:
    """A started server with this process's client pointed at it: the body of a pytest fixture."""
    with HubServer() as hub:
        point_client_at(monkeypatch, hub, home)
        try:
            yield hub
        finally:
            huggingface_hub.close_session()
