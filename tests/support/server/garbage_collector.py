"""Plays the garbage collector and the namespace controller, for an API server that runs without a controller manager.

Like the real one it works by uid: an object whose every owner is gone is deleted, owners are looked up live before
that, and the `orphan` and `foregroundDeletion` finalizers are honored.
"""

import asyncio
from typing import Any

from support.server.client import (
    KINDS,
    Access,
    ApiError,
    AsyncKube,
    Object,
    path_of,
)
from support.server.loop_thread import (
    LoopThread,
    Reflector,
    place_of,
    tolerate,
)

_SETTLE_SECONDS = 0.05
_ORPHAN, _FOREGROUND = "orphan", "foregroundDeletion"


class GarbageCollector:
    """Runs in a thread until stopped."""

    def __init__(self, access: Access) -> None:
        self._thread = LoopThread("garbage-collector")
        self._thread.run(self._start(access))

    def stop(self) -> None:
        self._thread.run(self._end())
        self._thread.stop()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._kube.close()

    async def _start(self, access: Access) -> None:
        self._kube = AsyncKube(access)
        self._dirty = asyncio.Event()
        kinds = [kind for kind in KINDS if kind not in ("Event", "Node", "CustomResourceDefinition")]
        self._reflectors = {kind: Reflector(self._kube, kind, None, lambda *_: self._dirty.set()) for kind in kinds}
        self._tasks = [asyncio.create_task(reflector.run()) for reflector in self._reflectors.values()]
        self._tasks.append(asyncio.create_task(self._run()))

    async def _run(self) -> None:
        while True:
            await self._dirty.wait()
            await asyncio.sleep(_SETTLE_SECONDS)
            self._dirty.clear()
            try:
                await self._sweep()
            except (ApiError, OSError, TimeoutError):
                await asyncio.sleep(0.3)
                self._dirty.set()

    def _all(self) -> list[tuple[str, Object]]:
        return [(kind, obj) for kind, reflector in self._reflectors.items() for obj in reflector.objects.values()]

    async def _sweep(self) -> None:
        everything = self._all()
        uids = {obj["metadata"]["uid"] for _, obj in everything}
        for kind, obj in everything:
            metadata = obj["metadata"]
            owners = metadata.get("ownerReferences") or []
            if owners and not metadata.get("deletionTimestamp") and not any(owner["uid"] in uids for owner in owners):
                await self._collect(kind, obj)
            if metadata.get("deletionTimestamp"):
                await self._finish(kind, obj, everything)

    async def _collect(self, kind: str, obj: Object) -> None:
        namespace, _ = place_of(obj)
        for owner in obj["metadata"]["ownerReferences"]:
            if owner["kind"] not in KINDS:
                return
            path = path_of(owner["kind"], namespace, owner["name"])
            found = await tolerate(404, work=self._kube.request("GET", path))
            if found and found["metadata"]["uid"] == owner["uid"]:
                return
        await self._delete(kind, obj)

    async def _delete(self, kind: str, obj: Object) -> None:
        body = {"propagationPolicy": "Background", "preconditions": {"uid": obj["metadata"]["uid"]}}
        request = self._kube.request("DELETE", path_of(kind, *place_of(obj)), body)
        await tolerate(404, 409, work=request)

    async def _finish(self, kind: str, obj: Object, everything: list[tuple[str, Object]]) -> None:
        """Do what the deletion of `obj` waits for."""
        if kind == "Namespace":
            await self._empty_namespace(obj, everything)
            return
        finalizers = obj["metadata"].get("finalizers") or []
        uid = obj["metadata"]["uid"]
        owned = [
            (other_kind, other)
            for other_kind, other in everything
            if any(owner["uid"] == uid for owner in other["metadata"].get("ownerReferences") or [])
        ]
        if _ORPHAN in finalizers:
            for other_kind, other in owned:
                await self._patch(other_kind, other, "ownerReferences", lambda owner: owner["uid"] != uid)
            await self._patch(kind, obj, "finalizers", lambda finalizer: finalizer != _ORPHAN)
        if _FOREGROUND in finalizers:
            for other_kind, other in owned:
                if not other["metadata"].get("deletionTimestamp"):
                    await self._delete(other_kind, other)
            if not owned:
                await self._patch(kind, obj, "finalizers", lambda finalizer: finalizer != _FOREGROUND)

    async def _patch(self, kind: str, obj: Object, key: str, keep: Any) -> None:
        kept = [entry for entry in obj["metadata"].get(key) or [] if keep(entry)]
        body = {"metadata": {key: kept, "uid": obj["metadata"]["uid"]}}
        path = path_of(kind, *place_of(obj))
        await tolerate(
            404, 409, 422, work=self._kube.request("PATCH", path, body, None, "application/merge-patch+json")
        )

    async def _empty_namespace(self, namespace: Object, everything: list[tuple[str, Object]]) -> None:
        name = namespace["metadata"]["name"]
        inside = [(kind, obj) for kind, obj in everything if obj["metadata"].get("namespace") == name]
        for kind, obj in inside:
            if not obj["metadata"].get("deletionTimestamp"):
                await self._delete(kind, obj)
        if not inside:
            body = namespace | {"spec": {"finalizers": []}}
            path = path_of("Namespace", None, name, "finalize")
            await tolerate(404, 409, work=self._kube.request("PUT", path, body))
