"""A proxy in front of a Kubernetes API that breaks things on purpose: it counts writes, dies at one of them, answers
with errors, cuts connections and watches, and is away for a while. Each fault is counted by its kind.
"""

import asyncio
import random
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable

import aiohttp
from aiohttp import web

from support.kube import Access

ERRORS = {409: "Conflict", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
_DROPPED = {"host", "content-length", "transfer-encoding", "connection", "accept-encoding", "content-encoding"}
_WRITES = ("POST", "PATCH", "PUT", "DELETE")


class ApiProxy:
    """Change `rate`, `away` and `die_at` (a number of writes, from 1) at any time. Once dead it stays dead."""

    def __init__(self, access: Access, seed: int = 0, counts: Counter[str] | None = None) -> None:
        self._access = access
        self._random = random.Random(seed)
        self.rate = 0.0
        self.away = False
        self.die_at: int | None = None
        self.dies_after_the_answer = False
        self.dead = asyncio.Event()
        self.writes = 0
        self.counts: Counter[str] = Counter() if counts is None else counts
        self._watches: set[web.StreamResponse] = set()

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

    def cut_watches(self) -> int:
        """End every open watch; how many there were."""
        cut = list(self._watches)
        for response in cut:
            if response._req is not None and response._req.transport is not None:
                response._req.transport.abort()
            self.counts["watch cut"] += 1
        return len(cut)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if self.dead.is_set() or self.away:
            if self.away:
                self.counts["away"] += 1
            return self._reset(request)
        is_write, is_watch = request.method in _WRITES, "watch" in request.query
        self.writes += is_write
        is_last = is_write and self.writes == self.die_at
        if is_last and not self.dies_after_the_answer:
            return self._die(request)
        fault = self._choose(is_write, is_watch)
        if fault == "reset":
            return self._reset(request)
        if fault == "410":
            return await self._gone(request)
        if fault and fault.isdecimal():
            return self._refuse(int(fault))
        answer = await self._forward(request)
        if is_last or fault == "late reset" or self.dead.is_set():
            answer.close()
            return self._die(request) if is_last else self._reset(request)
        return await self._relay(request, answer, is_watch)

    def _choose(self, is_write: bool, is_watch: bool) -> str | None:
        if self._random.random() >= self.rate:
            return None
        kinds = ["410", "reset", "500"] if is_watch else ["429", "500", "503", "reset", "late reset"]
        fault = self._random.choice(kinds + (["409"] if is_write and not is_watch else []))
        self.counts[fault] += 1
        return fault

    def _die(self, request: web.Request) -> web.StreamResponse:
        self.counts["killed after" if self.dies_after_the_answer else "killed before"] += 1
        self.dead.set()
        return self._reset(request)

    @staticmethod
    def _reset(request: web.Request) -> web.StreamResponse:
        if request.transport is not None:
            request.transport.abort()
        return web.Response(status=503)

    @staticmethod
    def _refuse(code: int) -> web.StreamResponse:
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": ERRORS[code], "code": code}
        headers = {"Retry-After": "1"} if code == 429 else {}
        return web.json_response({**status, "message": "injected", "metadata": {}}, status=code, headers=headers)

    @staticmethod
    async def _gone(request: web.Request) -> web.StreamResponse:
        """A watch that is told at once that its resource version is too old."""
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        status = b'{"kind":"Status","apiVersion":"v1","metadata":{},"status":"Failure","reason":"Expired","code":410}'
        await response.write(b'{"type":"ERROR","object":' + status + b"}\n")
        await response.write_eof()
        return response

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
        async with answer:
            if not is_watch:
                return web.Response(status=answer.status, body=await answer.read(), headers=kept)
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            self._watches.add(response)
            try:
                async for chunk in answer.content.iter_any():
                    await response.write(chunk)
            except (ConnectionError, aiohttp.ClientError):
                pass
            finally:
                self._watches.discard(response)
            return response


async def forever(seconds: float, act: Callable[[], Awaitable[None] | None]) -> None:
    """Do it again and again."""
    while True:
        await asyncio.sleep(seconds)
        result = act()
        if result is not None:
            await result
