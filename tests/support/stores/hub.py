"""A small model hub that the real huggingface_hub client talks to (through HF_ENDPOINT): repositories from folders."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from support.stores import hub_writes


@dataclass
class Repository:
    """One repository at one commit; `token` is needed when it is `gated` or `private`. `before`: what it was once."""

    folder: Path
    token: str | None = None
    gated: bool = False
    revisions: tuple[str, ...] = ("main",)
    before: "Repository | None" = None

    @property
    def commit(self) -> str:
        names = sorted((path.as_posix(), path.stat().st_mtime_ns) for path in self.folder.rglob("*"))
        return hashlib.sha1(json.dumps(names).encode()).hexdigest()

    def files(self) -> dict[str, Path]:
        return {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}


@dataclass
class Hub:
    """A running hub.

    `requests` are (method, path), as they came; `broken` makes every answer a 503; files are redirected to `cdn`, the
    address of another server. A hostile hub adds `headers` to every answer, passes what its API says through `twist`,
    and sends `more` bytes of a file than it announces, or until nobody takes them; `sent` are all of them.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken: bool = False
    cdn: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    twist: Callable[[Any], Any] = lambda answer: answer
    more: int = 0
    sent: int = 0
    #: The token that may write, the folder of repositories that it makes, what was uploaded, and each commit's files.
    writer: str = ""
    folder: Path | None = None
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    def add(self, name: str, folder: Path, **options: Any) -> None:
        """Serve `folder` as 'owner/name', or 'datasets/owner/name'."""
        self.repositories[name] = Repository(folder, **options)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        if self.hub.broken:
            return self._send(503, b"", {})
        if path.endswith("/auth-check/write"):
            return self.do_POST()
        if path.startswith("api/"):
            return self._api(path.removeprefix("api/").removeprefix("models/"))
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self._open(name, revision)
        if repository is not None:
            self._file(repository, file)
        return None

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append((self.command, path))
        body = self._body()
        if self.hub.broken:
            return self._send(503, b"", {})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        token = self.hub.writer if path.startswith("lfs/") else token  # its URL is a secret itself
        status, said = hub_writes.answer(self.hub, self.command, path, token, body)
        return self._send(status, json.dumps(said).encode(), {"Content-Type": "application/json"})

    do_PUT = do_POST  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _open(self, name: str, revision: str) -> Repository | None:
        repository = self.hub.repositories.get(name)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository is None:
            return self._error(404 if token else 401, "RepoNotFound")
        if repository.token is not None and token != repository.token:
            return self._error(403 if token else 401, "GatedRepo" if repository.gated else "RepoNotFound")
        if repository.before and revision == repository.before.commit:
            return repository.before
        if revision not in (*repository.revisions, repository.commit):
            return self._error(404, "RevisionNotFound")
        return repository

    def _api(self, path: str) -> None:
        kind = "revision" if "/revision/" in path else "tree"
        name, _, revision = path.partition(f"/{kind}/")
        repository = self._open(name, revision)
        if repository is None:
            return
        files = repository.files()
        siblings = [
            {"rfilename": path, "size": file.stat().st_size, "blobId": _sha1(file)} for path, file in files.items()
        ]
        answer: Any = {"id": name, "sha": repository.commit, "siblings": siblings}
        if kind == "tree":
            answer = [
                {"type": "file", "path": path, "oid": _sha1(file), "size": file.stat().st_size}
                for path, file in files.items()
            ]
        self._send(200, json.dumps(self.hub.twist(answer)).encode(), {"Content-Type": "application/json"})

    def _file(self, repository: Repository, path: str) -> None:
        file = repository.files().get(path)
        if file is None:
            return self._error(404, "EntryNotFound")
        headers = {"ETag": f'"{_sha1(file)}"', "X-Repo-Commit": repository.commit, "Accept-Ranges": "bytes"}
        if self.hub.cdn:
            size = str(file.stat().st_size)
            linked = {"Location": f"{self.hub.cdn}/{path}", "X-Linked-Size": size, "X-Linked-Etag": headers["ETag"]}
            return self._send(302, b"", headers | linked)
        if self.hub.more and self.command == "GET":
            return self._send_more(file.read_bytes(), headers)
        return self._send(200, file.read_bytes(), headers)

    def _send_more(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(200)
        for name, value in (headers | {"Transfer-Encoding": "chunked"}).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for chunk in (body, *(bytes(1 << 20) for _ in range(self.hub.more >> 20))):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                self.hub.sent += len(chunk)
        self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in (headers | self.hub.headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


def _sha1(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A hub on a free port of 127.0.0.1."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A model hub of its own for each test."""
    with hub_server() as server:
        yield server
