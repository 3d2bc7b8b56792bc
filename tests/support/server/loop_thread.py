"""An asyncio loop in a thread of its own, so that ordinary tests can use helpers that watch."""

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import aiohttp

from support.server.client import (
    ApiError,
    AsyncKube,
    Object,
    path_of,
)

#: Answers that say: what the request is about is not there, or is someone else's now.
_GONE = (404, 409)
T = TypeVar("T")
Place = tuple[str, str]


class LoopThread:
    """Start it, hand it coroutines, stop it; whatever still runs then is canceled."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], seconds: float = 60) -> T:
        """Run to the end and return the result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(seconds)

    def stop(self) -> None:
        if self.loop.is_closed():
            return
        self.run(self._cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    async def _cancel_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Reflector:
    """A local copy of all objects of a kind, kept current by list and watch; `on_change(type, object)` on each step."""

    def __init__(
        self, kube: AsyncKube, kind: str, namespace: str | None, on_change: Callable[[str, Object], None]
    ) -> None:
        self.kind = kind
        self.objects: dict[Place, Object] = {}
        self.synced = asyncio.Event()
        self._kube = kube
        self._path = path_of(kind, namespace)
        self._on_change = on_change

    async def run(self) -> None:
        """For ever; outages of the server are waited out."""
        while True:
            try:
                since = await self._list()
                self.synced.set()
                await self._watch(since)
            except (ApiError, aiohttp.ClientError, TimeoutError, ValueError):
                await asyncio.sleep(0.3)

    async def _list(self) -> str:
        found = await self._kube.request("GET", self._path)
        version, kind = found["apiVersion"], found["kind"].removesuffix("List")
        fresh = {place_of(obj): {"apiVersion": version, "kind": kind} | obj for obj in found["items"]}
        for place in set(self.objects) - set(fresh):
            self._on_change("DELETED", self.objects.pop(place))
        for place, obj in fresh.items():
            known = self.objects.get(place)
            self.objects[place] = obj
            if known is None or known["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
                self._on_change("MODIFIED" if known else "ADDED", obj)
        return str(found["metadata"]["resourceVersion"])

    async def _watch(self, since: str) -> None:
        while True:
            async with contextlib.aclosing(self._kube.watch(self._path, since)) as events:
                async for event in events:
                    obj = event["object"]
                    if event["type"] == "ERROR":
                        raise ApiError(obj.get("code", 500), obj)
                    since = obj["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK":
                        self._take(event["type"], obj)

    def _take(self, kind: str, obj: Object) -> None:
        if kind == "DELETED":
            self.objects.pop(place_of(obj), None)
        else:
            self.objects[place_of(obj)] = obj
        self._on_change(kind, obj)


def place_of(obj: Object) -> Place:
    return obj["metadata"].get("namespace", ""), obj["metadata"]["name"]


async def tolerate(*codes: int, work: Awaitable[T]) -> T | None:
    """Await `work`; answers of these codes are fine and give None."""
    try:
        return await work
    except ApiError as error:
        if error.code in codes:
            return None
        raise


async def persist(
    kube: AsyncKube, method: str, path: str, body: Object | None = None, content_type: str = "application/json"
) -> Object | None:
    """A request that outlasts outages of the server; None when what it is about is gone or someone else's."""
    while True:
        try:
            return await kube.request(method, path, body, None, content_type)
        except ApiError as error:
            if error.code in _GONE:
                return None
            if error.code < 500 and error.code != 429:
                raise
        except (aiohttp.ClientError, TimeoutError):
            pass
        await asyncio.sleep(0.3)
