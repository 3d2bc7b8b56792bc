"""A proxy in front of a Kubernetes API that breaks things on purpose: it counts writes, dies at one of them, answers
with errors and with web pages, cuts, freezes and expires watches, is away for a while, and has the wrong time. Each
fault is counted by its kind; of an outage only its beginning, however many requests meet it.
"""

import asyncio
import json
import random
import ssl
from collections import Counter
from datetime import timedelta
from email.utils import format_datetime, parsedate_to_datetime

import aiohttp
from aiohttp import web

from support.server.client import Access

ERRORS = {404: "NotFound", 409: "Conflict", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
OF_WATCHES = ("410 event", "410 status", "500", "html", "reset")
OF_READS = ("429", "500", "503", "html", "late html", "reset", "late reset")
OF_WRITES = (*OF_READS, "409")
_EXPIRED = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410, "metadata": {}}
_PAGE = "<!DOCTYPE html><html><body>This site is down for maintenance</body></html>"
_DROPPED = {"host", "content-length", "transfer-encoding", "connection", "accept-encoding", "content-encoding"}
_WRITES = ("POST", "PATCH", "PUT", "DELETE")


class _Watch:
    """An open watch; while it is frozen the connection stands and nothing comes."""

    def __init__(self, path: str, response: web.StreamResponse) -> None:
        self.path, self.response = path, response
        self.flows = asyncio.Event()
        self.flows.set()


class ApiProxy:
    """Change `rate`, `away`, `date_skew` and `die_at` (a number of writes, from 1) at any time. Dead is dead."""

    def __init__(self, access: Access, seed: int = 0, counts: Counter[str] | None = None) -> None:
        self._access = access
        self._random = random.Random(seed)
        self.rate = 0.0
        self.date_skew = 0.0
        self.die_at: int | None = None
        self.dies_after_the_answer = False
        self.dead = asyncio.Event()
        self.writes = 0
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.away = False
        self._no_watches = False
        self._expired: dict[str, str] = {}
        self._watches: set[_Watch] = set()
        self.watched: Counter[str] = Counter()
        """Watch requests by path."""

    async def __aenter__(self) -> "ApiProxy":
        tls = ssl.create_default_context(cafile=str(self._access.ca_file)) if self._access.ca_file else True
        self._client = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=0), auto_decompress=False, read_bufsize=2**22
        )
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._client.close()
        await self._runner.cleanup()

    @property
    def access(self) -> Access:
        return Access(self.url, self._access.token)

    async def outage(self, seconds: float) -> None:
        """Answer nothing for a while; open watches end, too."""
        self.counts["outage"] += 1
        self.away = True
        self.cut_watches(count=False)
        await asyncio.sleep(seconds)
        self.away = False

    def cut_watches(self, count: bool = True) -> int:
        """End every open watch; how many there were."""
        cut = list(self._watches)
        for watch in cut:
            if watch.response._req is not None and watch.response._req.transport is not None:
                watch.response._req.transport.abort()
            self.counts["watch cut"] += count
        return len(cut)

    def freeze_watches(self) -> int:
        """Let nothing more through the watches that are open now; how many there were."""
        for watch in self._watches:
            watch.flows.clear()
            self.counts["watch frozen"] += 1
        return len(self._watches)

    def thaw_watches(self) -> None:
        """End that: what was held back comes."""
        for watch in self._watches:
            watch.flows.set()

    def stop_watches(self) -> None:
        """End every open watch and take no new one, until `expire_watches`."""
        self._no_watches = True
        self.cut_watches(count=False)

    def expire_watches(self, how: str, resource: str = "") -> None:
        """Tell every watch (of that resource) at its next request that its resource version is too old: "410 event" or
        "410 status"; or that there is nothing to watch: "404"."""
        self._expired = {path: how for path in self.watched if path.endswith(resource)}
        self._no_watches = False
        self.cut_watches(count=False)

    def open_watches(self) -> Counter[str]:
        """Watches that are open now, by resource."""
        return Counter(watch.path.rpartition("/")[2] for watch in self._watches)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        is_write, is_watch = request.method in _WRITES, "watch" in request.query
        if self.dead.is_set() or self.away or (is_watch and self._no_watches):
            return self._reset(request)
        self.writes += is_write
        is_last = is_write and self.writes == self.die_at
        if is_last and not self.dies_after_the_answer:
            return self._die(request)
        fault = self._choose(request.path, is_write, is_watch)
        if fault and not fault.startswith("late "):
            return await self._fail(request, fault)
        try:
            answer = await self._forward(request)
        except aiohttp.ClientConnectionError:  # this proxy is being closed
            return self._reset(request)
        if is_last or fault == "late reset" or self.dead.is_set():
            answer.close()
            return self._die(request) if is_last else self._reset(request)
        if fault == "late html":
            answer.close()
            return await self._fail(request, "html")
        return await self._relay(request, answer, is_watch)

    def _choose(self, path: str, is_write: bool, is_watch: bool) -> str | None:
        if is_watch and (fault := self._expired.pop(path, None)):
            self.counts[fault] += 1
            return fault
        if self._random.random() >= self.rate:
            return None
        fault = self._random.choice(OF_WATCHES if is_watch else OF_WRITES if is_write else OF_READS)
        self.counts[fault] += 1
        return fault

    def _die(self, request: web.Request) -> web.StreamResponse:
        self.counts["killed after" if self.dies_after_the_answer else "killed before"] += 1
        self.dead.set()
        return self._reset(request)

    async def _fail(self, request: web.Request, fault: str) -> web.StreamResponse:
        if fault == "reset":
            return self._reset(request)
        if fault == "html":
            return web.Response(text=_PAGE, content_type="text/html")
        if fault == "410 status":
            return web.json_response(_EXPIRED, status=410)
        if fault == "410 event":
            response = web.StreamResponse(headers={"Content-Type": "application/json"})
            await response.prepare(request)
            await response.write(json.dumps({"type": "ERROR", "object": _EXPIRED}).encode() + b"\n")
            await response.write_eof()
            return response
        code = int(fault)
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": ERRORS[code], "code": code}
        headers = {"Retry-After": "1"} if code == 429 else {}
        return web.json_response({**status, "message": "injected", "metadata": {}}, status=code, headers=headers)

    @staticmethod
    def _reset(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=503)

    async def _forward(self, request: web.Request) -> aiohttp.ClientResponse:
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _DROPPED}
        headers["Accept-Encoding"] = "identity"
        return await self._client.request(
            request.method,
            self._access.server + request.raw_path,
            headers=headers,
            data=await request.read() or None,
            timeout=aiohttp.ClientTimeout(total=None),
        )

    async def _relay(self, request: web.Request, answer: aiohttp.ClientResponse, is_watch: bool) -> web.StreamResponse:
        kept = {key: value for key, value in answer.headers.items() if key.lower() not in _DROPPED}
        if self.date_skew and "Date" in kept:
            there = parsedate_to_datetime(kept["Date"]) + timedelta(seconds=self.date_skew)
            kept["Date"] = format_datetime(there, usegmt=True)
        async with answer:
            if not is_watch:
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            watch = _Watch(request.path, response)
            self._watches.add(watch)
            self.watched[request.path] += 1
            try:
                async for chunk in answer.content.iter_any():
                    await watch.flows.wait()
                    await response.write(chunk)
            except (ConnectionError, aiohttp.ClientError):
                pass
            finally:
                self._watches.discard(watch)
            return response
