"""A proxy in front of an S3 server that breaks things on purpose, seeded, and counts what it broke."""

import hashlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, Literal
from urllib.parse import urlsplit

Fault = Literal[
    "500",  # refused with an internal error; nothing reaches the server
    "503",  # S3's SlowDown
    "late 500",  # the server does it, the client hears of an error
    "reset",  # the connection is reset; nothing reaches the server
    "late reset",  # the server does it, the answer is lost
    "slow",  # the answer takes a while
    "cut answer",  # the connection ends in the middle of the answer
    "short answer",  # the answer is shorter, and says so
    "wrong answer",  # a byte of the answer's body changes
    "wrong upload",  # a byte of the request's body changes on the way to the server
    "short upload",  # the end of the request's body is lost on the way to the server
    "crash",  # from here on nothing gets through: as if the client had died between two requests
]
ALL: Final[tuple[Fault, ...]] = (
    "500", "503", "late 500", "reset", "late reset", "slow",
    "cut answer", "short answer", "wrong answer", "wrong upload", "short upload",
)  # fmt: skip
_UPLOAD_FAULTS: Final[tuple[Fault, ...]] = ("wrong upload", "short upload")
_ANSWER_FAULTS: Final[tuple[Fault, ...]] = ("cut answer", "short answer", "wrong answer")
_HOP_BY_HOP: Final = {"connection", "transfer-encoding", "keep-alive", "expect", "content-length"}
_ERROR: Final = "<?xml version='1.0'?><Error><Code>{0}</Code><Message>{0}</Message><RequestId>0</RequestId></Error>"


@dataclass(frozen=True)
class Request:
    """What a fault may depend on."""

    method: str
    path: str
    query: str
    has_body: bool
    range: str = ""

    def fitting(self, kinds: Sequence[Fault]) -> list[Fault]:
        """Those of `kinds` that make sense here (no body, no wrong byte in it), the ones that harm bytes more often."""
        bytes_up = [kind for kind in kinds if kind in _UPLOAD_FAULTS and self.has_body]
        bytes_down = [kind for kind in kinds if kind in _ANSWER_FAULTS and self.method in ("GET", "POST")]
        others = [kind for kind in kinds if kind not in _UPLOAD_FAULTS + _ANSWER_FAULTS]
        return others + bytes_up * 3 + bytes_down * 2 or ["500"]


@dataclass
class Faults:
    """Breaks each request with probability `rate`, by one of `kinds`. Change `rate` or `only` at any time.

    `crash_at`: the request (counted from 1, among those `only` lets through) from which on all is dead, until `revive`.
    """

    seed: int = 0
    rate: float = 0.0
    kinds: Sequence[Fault] = ALL
    only: Callable[[Request], bool] = lambda request: True
    crash_at: int | None = None
    on_crash: Callable[[], None] | None = None
    slow_seconds: float = 0.2
    counts: Counter[str] = field(default_factory=Counter)
    requests: int = 0
    is_dead: bool = False

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()

    def choose(self, request: Request) -> Fault | None:
        """The fault for this request, counted."""
        with self._lock:
            if self.is_dead:
                return "crash"
            if not self.only(request):
                return None
            self.requests += 1
            if self.crash_at is not None and self.requests >= self.crash_at:
                self.is_dead = True
                self.counts["crash"] += 1
                if self.on_crash is not None:
                    self.on_crash()
                return "crash"
            if self._random.random() >= self.rate:
                return None
            fault = self._random.choice(request.fitting(self.kinds))
            self.counts[fault] += 1
            return fault

    def revive(self) -> None:
        """After a crash: everything gets through again."""
        with self._lock:
            self.is_dead, self.crash_at = False, None

    @property
    def total(self) -> int:
        """Faults so far."""
        return sum(self.counts.values())

    def flipped(self, data: bytes) -> bytes:
        """`data` with one bit changed."""
        if not data:
            return data
        place = self._random.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << self._random.randrange(8))]) + data[place + 1 :]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60
    faults: Faults
    upstream: tuple[str, int]
    checks_payload: Callable[[str], bool]

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        parts = urlsplit(self.path)
        fault = self.faults.choose(
            Request(self.command, parts.path, parts.query, bool(body), self.headers.get("Range", ""))
        )
        if fault in ("reset", "crash"):
            return self._reset()
        if fault in ("500", "503"):
            return self._refuse(int(fault), "InternalError" if fault == "500" else "SlowDown")
        if fault == "slow":
            time.sleep(self.faults.slow_seconds)
        if fault == "wrong upload":
            body = self.faults.flipped(body)
        if fault == "short upload":
            body = body[: len(body) // 2]
        if self._is_caught_by_server(parts.path, body):
            return self._refuse(400, "XAmzContentSHA256Mismatch")
        status, headers, answer = self._forward(body)
        if fault == "late reset":
            return self._reset()
        if fault == "late 500":
            return self._refuse(500, "InternalError")
        if fault == "wrong answer":
            answer = self.faults.flipped(answer)
        if fault == "short answer":
            answer = answer[: len(answer) // 2]
        return self._answer(status, headers, answer, cut=fault == "cut answer")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    def _is_caught_by_server(self, path: str, body: bytes) -> bool:
        """S3 compares the body with the signed digest; moto does not, so this is done in its stead where asked for."""
        signed = self.headers.get("x-amz-content-sha256", "")
        return type(self).checks_payload(path) and len(signed) == 64 and hashlib.sha256(body).hexdigest() != signed

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body or None)
            answer = connection.getresponse()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _HOP_BY_HOP]
            data = answer.read()
            if self.command == "HEAD":
                headers.append(("Content-Length", answer.getheader("Content-Length", "0")))
            return answer.status, headers, data
        finally:
            connection.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if cut:
            self.wfile.write(body[: len(body) // 2])
            self._reset()
        else:
            self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        body = b"" if self.command == "HEAD" else _ERROR.format(code).encode()
        headers = [("Content-Type", "application/xml")] + ([("Content-Length", "0")] if self.command == "HEAD" else [])
        self._answer(status, headers, body)

    def _reset(self) -> None:
        """Close so that the other side gets a reset (RST), no orderly end."""
        self.close_connection = True
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            self.close_connection = True

    def finish(self) -> None:
        try:
            super().finish()
        except (OSError, ValueError):
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *args: Any) -> None:
        pass


@contextmanager
def faulty(endpoint: str, faults: Faults, checks_payload: Callable[[str], bool] = lambda path: False) -> Iterator[str]:
    """The endpoint of a proxy in front of `endpoint` that breaks requests as `faults` says.

    For paths that `checks_payload` holds for, a body that does not match its signed digest is refused, as S3 does with
    every body and moto with none.
    """
    parts = urlsplit(endpoint)
    members = {
        "faults": faults,
        "upstream": (parts.hostname, parts.port),
        "checks_payload": staticmethod(checks_payload),
    }
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), members))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
