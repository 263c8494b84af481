# SPDX-License-Identifier: Apache-2.0
"""A model Hub on localhost, for tests: the HTTP API that huggingface_hub calls to push, pull and list, in memory.

Not covered: Xet transfers, datasets and spaces, organisations, folders in lists, pages of long lists.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session
from transformers.utils.hub import hf_api as transformers_api

OWNER, OWNER_TOKEN = "user", "hf_owner"  # owns every repo user/...
GUEST, GUEST_TOKEN = "guest", "hf_guest"  # may read what is public
LARGE = (".safetensors", ".bin", ".pt")


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


class Dropped(Exception):
    """The connection ends without an answer."""


@dataclass(frozen=True)
class File:
    """A file of a commit; large ones are LFS objects, known by their sha256."""

    data: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A state of a repo: all its files by path."""

    files: dict[str, File]
    parent: str | None
    title: str


@dataclass
class Repo:
    """A model repo. Pull requests are branches `refs/pr/N`."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, files: dict[str, File], title: str, parent: str | None = None) -> str:
        sha = secrets.token_hex(20)
        self.commits[sha] = Commit(files, parent, title)
        self.branches[branch] = sha
        return sha

    def sha(self, revision: str) -> str:
        found = self.branches.get(revision) or self.tags.get(revision)
        if found is None and revision not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found or revision

    def history(self, branch: str = "main") -> list[str]:
        """Titles of the commits of a branch, oldest first."""
        titles, sha = [], self.branches.get(branch)
        while sha:
            titles.append(self.commits[sha].title)
            sha = self.commits[sha].parent
        return titles[::-1]

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.data for path, file in self.commits[self.sha(revision)].files.items()}


@dataclass
class LocalHub:
    """The state behind the server. `intercept(method, path)` runs before each request and may raise a `Refusal` or `Dropped`."""

    endpoint: str = ""
    tokens: dict[str, str] = field(default_factory=lambda: {OWNER_TOKEN: OWNER, GUEST_TOKEN: GUEST})
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    intercept: Callable[[str, str], None] | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


class Handler(BaseHTTPRequestHandler):
    """One request. Each route is a method that is given the named groups of its pattern, unquoted."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two would wait for each other
    hub: LocalHub

    def log_message(self, *_: object) -> None:
        """Tests are quiet."""

    # --- plumbing ---------------------------------------------------------------------------------------------------
    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        method = "GET" if self.command == "HEAD" else self.command
        try:
            with self.hub.lock:
                if self.hub.intercept is not None:
                    self.hub.intercept(self.command, url.path)
                for wanted, pattern, route in ROUTES:
                    if wanted == method and (match := re.fullmatch(pattern, url.path)):
                        groups = {name: unquote(text) for name, text in match.groupdict("").items()}
                        return route(self, **groups)
            raise Refusal(404, f"no route for {method} {url.path}")
        except Refusal as refusal:
            self.send({"error": str(refusal)}, refusal.status, refusal.headers)
        except Dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def logged_in(self) -> str:
        if (user := self.user()) is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def found(self, repo: str) -> Repo:
        user, there = self.user(), self.hub.repos.get(repo)
        if there is None or (there.private and user != OWNER):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return there

    def writable(self, repo: str) -> Repo:
        there = self.found(repo)
        if self.logged_in() != OWNER:
            raise Refusal(403, "you must have write access to this repo")
        return there

    # --- account, repos, branches -----------------------------------------------------------------------------------
    def who_am_i(self) -> None:
        access = {"displayName": "test", "role": "write"}
        self.send({"type": "user", "name": self.logged_in(), "orgs": [], "auth": {"accessToken": access}})

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        user = self.logged_in()
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if owner != user:
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        url = f"{self.hub.endpoint}/{name}"
        if name in self.hub.repos:
            return self.send({"error": "You already created this model repo", "url": url}, 409)
        self.hub.repos[name] = Repo(private=wanted.get("visibility") == "private")
        self.hub.repos[name].add("main", {".gitattributes": File(b"", False)}, "initial commit")
        self.send({"url": url, "name": name})

    def info(self, repo: str, revision: str = "") -> None:
        there = self.found(repo)
        sha = there.sha(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(there.commits[sha].files)]
        self.send({"id": repo, "sha": sha, "private": there.private, "gated": there.gated, "siblings": siblings})

    def refs(self, repo: str) -> None:
        there = self.found(repo)

        def entries(table: dict[str, str]) -> list[dict[str, str]]:
            names = [name for name in table if not name.startswith("refs/")]
            return [{"name": name, "ref": f"refs/{name}", "targetCommit": table[name]} for name in names]

        self.send({"branches": entries(there.branches), "tags": entries(there.tags), "converts": []})

    def create_branch(self, repo: str, name: str) -> None:
        there = self.writable(repo)
        if name in there.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        there.branches[name] = there.sha(json.loads(self.body or b"{}").get("startingPoint", "main"))
        self.send({})

    def create_tag(self, repo: str, revision: str) -> None:
        there = self.writable(repo)
        there.tags[json.loads(self.body)["tag"]] = there.sha(revision)
        self.send({})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        there = self.found(repo)
        prefix = f"{folder}/" if folder else ""
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries = []
        for path, file in sorted(there.commits[there.sha(revision)].files.items()):
            if path.startswith(prefix) and (recursive or "/" not in path.removeprefix(prefix)):
                size = len(file.data)
                large = {"lfs": {"oid": file.sha256, "size": size, "pointerSize": 134}}
                entry = {"type": "file", "path": path, "size": size, "oid": file.git_oid}
                entries.append(entry | (large if file.large else {}))
        if prefix and not entries:
            raise Refusal(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self.send(entries)

    # --- uploading --------------------------------------------------------------------------------------------------
    def validate_yaml(self) -> None:
        self.send({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        there = self.found(repo) if self.query.get("create_pr") else self.writable(repo)
        files = there.commits[there.sha(revision)].files
        answers = []
        for wanted in json.loads(self.body)["files"]:
            old = files.get(wanted["path"])
            oid = (old.sha256 if old.large else old.git_oid) if old else None
            mode = "lfs" if wanted["path"].endswith(LARGE) else "regular"
            answers.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        self.found(repo)
        self.logged_in()
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            target = {"href": f"{self.hub.endpoint}/objects/{wanted['oid']}", "header": {}}
            actions = {} if wanted["oid"] in self.hub.objects else {"actions": {"upload": target}}
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **actions})
        self.send({"transfer": "basic", "objects": objects})

    def put_object(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the object does not have this sha256")
        self.hub.objects[oid] = self.body
        self.send(b"")

    def commit(self, repo: str, revision: str) -> None:
        as_pull_request = bool(self.query.get("create_pr"))
        there = self.found(repo) if as_pull_request else self.writable(repo)
        self.logged_in()
        if revision not in there.branches:
            raise Refusal(400, f"{revision} is no branch")
        header, *changes = (json.loads(line) for line in self.body.splitlines())
        parent, expected = there.branches[revision], header["value"].get("parentCommit")
        if as_pull_request:
            revision, parent = f"refs/pr/{1 + len(there.branches)}", expected or parent
        elif expected not in (None, parent):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(there.commits[parent].files)
        for change in changes:
            kind, value = change["key"], change["value"]
            if kind == "file":
                files[value["path"]] = File(base64.b64decode(value["content"]), large=False)
            elif kind == "lfsFile" and value["oid"] in self.hub.objects:
                files[value["path"]] = File(self.hub.objects[value["oid"]], large=True)
            elif kind == "deletedFile" and value["path"] in files:
                del files[value["path"]]
            else:
                raise Refusal(400, f"cannot do {kind} {value}")
        sha = there.add(revision, files, header["value"]["summary"], parent)
        url = f"{self.hub.endpoint}/{repo}"
        pull_request = {"pullRequestUrl": f"{url}/discussions/{revision.split('/')[-1]}"} if as_pull_request else {}
        self.send({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **pull_request})

    # --- downloading ------------------------------------------------------------------------------------------------
    def resolve(self, repo: str, revision: str, path: str) -> None:
        there = self.found(repo)
        sha = there.sha(revision)
        if there.gated and self.user() != OWNER:
            raise Refusal(403, f"Access to model {repo} is restricted", "GatedRepo")
        file = there.commits[sha].files.get(path)
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{file.git_oid}"'}
        if not file.large:
            return self.send(file.data, headers=headers)
        # As on the Hub, from another host: the client follows a redirect to the same one and loses these headers.
        location = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/objects/{file.sha256}"
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.data)), "Location": location}
        self.hub.objects.setdefault(file.sha256, file.data)
        self.send(b"", 302, {**headers, **linked})

    def get_object(self, oid: str) -> None:
        self.send(self.hub.objects[oid], headers={"ETag": f'"{oid}"'})


_REPO, _REVISION = r"(?P<repo>[^/]+/[^/]+|[^/]+)", r"(?P<revision>[^/]+)"
_API = f"/api/models/{_REPO}"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.who_am_i),
    ("POST", "/api/repos/create", Handler.create_repo),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"{_API}/refs", Handler.refs),
    ("POST", f"{_API}/branch/(?P<name>[^/]+)", Handler.create_branch),
    ("POST", f"{_API}/tag/{_REVISION}", Handler.create_tag),
    ("GET", f"{_API}/tree/{_REVISION}(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", f"{_API}/preupload/{_REVISION}", Handler.preupload),
    ("POST", f"{_API}/commit/{_REVISION}", Handler.commit),
    ("GET", f"{_API}/revision/{_REVISION}", Handler.info),
    ("GET", _API, Handler.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", Handler.put_object),
    ("GET", "/objects/(?P<oid>[0-9a-f]{64})", Handler.get_object),
    ("GET", f"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", Handler.resolve),
]


@contextlib.contextmanager
def serve() -> Iterator[LocalHub]:
    """A hub on a free port of this machine, in a thread."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def as_the_hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[LocalHub]:
    """An empty hub that this process takes for the Hub, logged in as its owner, with a cache in the folder `home`.

    huggingface_hub reads its environment when it is imported, so its constants are changed, not the environment.
    """
    with serve() as hub:
        changes = {
            "ENDPOINT": hub.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_DISABLE_XET": True,  # uploads would not ask whether the server knows it
        }
        for name, value in changes.items():
            monkeypatch.setattr(constants, name, value)
        for client in (hf_api.api, transformers_api()):
            monkeypatch.setattr(client, "endpoint", hub.endpoint)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setenv("HF_TOKEN", OWNER_TOKEN)
        yield hub
        close_session()
