"""An OCI registry: a small stand-in, and Docker's (Debian's `docker-registry`, or $REGISTRY) where it is installed."""

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from support.stores.tokens import ISSUER, SERVICE, Tokens

USER, PASSWORD = "trainer", "registry-password"
#: Docker's registry takes bcrypt alone, which Python does not bring.
_HASHED = "$2b$04$32LdzpnQny0nSaJ2w4gale5C1CRgQTLzx2ww/cvXoYXzLu71gHNYq"
#: What they are sent as.
LOGIN = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"
BINARY = os.environ.get("REGISTRY") or shutil.which("docker-registry") or shutil.which("registry") or ""


@dataclass
class Registry:
    """A running registry, and what the stand-in is told to do and has seen.

    Attributes:
        address: host:port.
        real: Whether it is Docker's.
        faults: Answers that it gives before its own: (method, path part, status); status 0 breaks off half-way.
        requests: Method and path of each request.
        ranges: The Range of each GET of a blob.
        tokens: Who is asked for tokens; without, it takes user and password.
        storage: Base URL that it redirects GET and HEAD of blobs to.
        stored: Headers of what came to the storage, which is the stand-in at another address.
        deletes_tags: Whether users may delete tags.
    """

    address: str
    real: bool
    faults: list[tuple[str, str, int]] = field(default_factory=list)
    requests: list[tuple[str, str]] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    tokens: Tokens | None = None
    storage: str = ""
    stored: list[Message] = field(default_factory=list)
    deletes_tags: bool = True

    def uri(self, name: str) -> str:
        return f"oci://{self.address}/{name}"

    def docker_config(self, password: str = PASSWORD) -> str:
        """What `kubectl create secret docker-registry` writes."""
        auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
        return json.dumps({"auths": {self.address: {"auth": auth}}})

    def login(self, folder: Path) -> dict[str, str]:
        """The environment of a user who has logged in."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(self.docker_config())
        return {"DOCKER_CONFIG": str(folder)}


class _Handler(BaseHTTPRequestHandler):
    """As much of the registry API v2 as pushing and pulling needs, with basic authentication."""

    protocol_version = "HTTP/1.1"
    registry: Registry
    blobs: dict[str, bytes]
    manifests: dict[tuple[str, str], tuple[str, bytes]]

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(body)

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.registry.requests.append((self.command, url.path))
        for fault in self.registry.faults:
            if fault[0] == self.command and fault[1] in url.path and fault[2]:
                self.registry.faults.remove(fault)
                where = {"Location": "http://elsewhere.test/x"} if fault[2] == 307 else {}
                return self._answer(fault[2], b'{"errors": [{"code": "UNKNOWN"}]}', **where)
        if url.path.startswith("/stored/"):
            self.registry.stored.append(self.headers)
            return self._blob(url.path.rpartition("/")[2])
        tokens, sent = self.registry.tokens, self.headers.get("Authorization")
        if not (tokens.accept(sent) if tokens else sent == LOGIN):
            return self._answer(401, WWW_Authenticate=tokens.challenge if tokens else 'Basic realm="stand-in"')
        name, kind, reference = re.fullmatch(r"/v2/(.+)/(blobs|manifests)/(.*)", url.path).groups()  # type: ignore[union-attr]
        if kind == "manifests":
            return self._manifest(name, reference, body)
        if self.command == "POST":
            return self._answer(202, Location=f"/v2/{name}/blobs/uploads/1?state=x")
        if self.command == "PUT":
            digest = parse_qs(url.query)["digest"][0]
            if digest != f"sha256:{hashlib.sha256(body).hexdigest()}":
                return self._answer(400, b'{"errors": [{"code": "DIGEST_INVALID"}]}')
            self.blobs[digest] = body
            return self._answer(201, Location=f"/v2/{name}/blobs/{digest}")
        if self.registry.storage:
            return self._answer(307, Location=f"{self.registry.storage}/stored/{reference}?signature=x")
        return self._blob(reference)

    def _blob(self, reference: str) -> None:
        if reference not in self.blobs:
            return self._answer(404, b'{"errors": [{"code": "BLOB_UNKNOWN"}]}')
        found = self.blobs[reference]
        if self.command == "HEAD":
            return self._answer(200, found)
        self.registry.ranges.append(self.headers.get("Range"))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        kept = found[int(asked[1]) : int(asked[2]) + 1] if asked else found
        status = 206 if asked else 200
        return None if self._broke_off(status, kept) else self._answer(status, kept)

    def _broke_off(self, status: int, body: bytes) -> bool:
        """Send half of it, if that is asked for."""
        found = (each for each in self.registry.faults if each[0] == self.command and each[1] in self.path)
        if (fault := next((each for each in found if each[2] == 0), None)) is None:
            return False
        self.registry.faults.remove(fault)
        self.close_connection = True
        self.send_response_only(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        return True

    def _manifest(self, name: str, reference: str, body: bytes) -> None:
        if self.command == "PUT":
            digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
            for each in (reference, digest):
                self.manifests[name, each] = (self.headers["Content-Type"], body)
            return self._answer(201, Docker_Content_Digest=digest)
        if self.command == "DELETE":
            if not self.registry.deletes_tags:
                return self._answer(405, b'{"errors": [{"code": "UNSUPPORTED"}]}')
            gone = self.manifests.pop((name, reference), None)
            if reference.startswith("sha256:"):  # with all tags that name it
                for key in [key for key, value in self.manifests.items() if value == gone]:
                    del self.manifests[key]
            return self._answer(202 if gone else 404)
        kind, found = self.manifests.get((name, reference), ("", b""))
        if self._broke_off(200, found):
            return None
        return self._answer(200, found, Content_Type=kind) if kind else self._answer(404)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _any  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def standin_registry(certificate: tuple[Path, Path] | None = None) -> Iterator[Registry]:
    """The stand-in on a free port of 127.0.0.1; with TLS, if there are a certificate's and its key's file."""
    registry = Registry("", real=False)
    handler = type("Handler", (_Handler,), {"registry": registry, "blobs": {}, "manifests": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # type: ignore[method-assign]  # who does not trust it hangs up
    registry.address = f"127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield registry
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def docker_registry(folder: Path, tokens: Tokens | None = None) -> Iterator[Registry]:
    """Docker's registry on a free port of 127.0.0.1, which wants USER and PASSWORD, or a token."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    (folder / "users").write_text(f"{USER}:{_HASHED}\n")
    settings: dict[str, Any] = {
        "version": 0.1,
        "log": {"accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}, "delete": {"enabled": True}},
        "auth": {"htpasswd": {"realm": "test", "path": str(folder / "users")}},
        "http": {"addr": address},
    }
    if tokens:
        realm = {"realm": f"http://{tokens.address}/token", "service": SERVICE, "issuer": ISSUER}
        settings["auth"] = {"token": realm | {"rootcertbundle": str(tokens.authority.write(folder)[0])}}
    (folder / "config.yml").write_text(json.dumps(settings))
    process = subprocess.Popen(
        [BINARY, "serve", str(folder / "config.yml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(address, process)
        yield Registry(address, real=True, tokens=tokens)
    finally:
        process.terminate()
        process.wait()


def _wait_for(address: str, process: "subprocess.Popen[bytes]") -> None:
    host, _, port = address.partition(":")
    for _ in range(400):
        assert process.poll() is None, "the registry ended"
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError(address)


@pytest.fixture(scope="module", params=["stand-in", "real"])
def registry(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    """A registry: the stand-in, and Docker's where it is installed."""
    if request.param == "stand-in":
        with standin_registry() as found:
            yield found
        return
    if not BINARY:
        pytest.skip("no registry is installed: apt install docker-registry")
    with docker_registry(tmp_path_factory.mktemp("registry")) as found:
        yield found
