"""Why pods wait, where their own status does not say: events (quota, volumes, Secrets) and Kueue's Workloads.

Both are watched with a field or label selector, from the present state on; a watch that breaks is started again.
"""

import asyncio
from collections.abc import Callable

import structlog

from finetune_operator.cache import Cache
from finetune_operator.cluster import ApiError, Cluster, path
from finetune_operator.core import raw
from finetune_operator.core.observed import Notice
from finetune_operator.core.raw import Raw

log = structlog.get_logger(__name__)

#: The reasons that explain a wait, by the kind of object they are about.
EVENT_SELECTORS = (
    "involvedObject.kind=Job,reason=FailedCreate",
    "involvedObject.kind=Pod,reason=FailedMount",
    "involvedObject.kind=Pod,reason=FailedAttachVolume",
)
KUEUE_GROUP = "kueue.x-k8s.io"
KUEUE_LABEL = f"{KUEUE_GROUP}/job-uid"
WATCH_SECONDS = 240
_RETRY_SECONDS = (1, 2, 5, 10, 30)


def of_event(obj: Raw) -> tuple[str, Notice] | None:
    """What an event says, with the uid of the object it is about."""
    about = raw.mapping(obj, "involvedObject")
    uid, reason = raw.text(about, "uid"), raw.text(obj, "reason")
    return (uid, Notice(reason, raw.text(obj, "message"))) if uid and reason else None


def of_workload(obj: Raw) -> tuple[str, Notice] | None:
    """What a Kueue Workload without quota says, with the uid of its Job."""
    uid = raw.labels(obj).get(KUEUE_LABEL, "")
    for entry in raw.entries(obj, "status", "conditions"):
        if uid and entry.get("type") == "QuotaReserved" and entry.get("status") == "False":
            return uid, Notice("Queued", raw.text(entry, "message"))
    return None


class Notices:
    """Keeps the cache's notices up to date. `on_news` is called with the job's key."""

    def __init__(
        self, cluster: Cluster, cache: Cache, namespaces: tuple[str, ...], on_news: Callable[[str], None]
    ) -> None:
        self._cluster, self._cache, self._on_news = cluster, cache, on_news
        self._namespaces: tuple[str | None, ...] = namespaces or (None,)

    async def run(self, kueue: str) -> None:
        """Watch until cancelled. `kueue`: auto, enabled or disabled."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._namespaces:
                for selector in EVENT_SELECTORS:
                    where = path("Event", namespace)
                    group.create_task(self._follow(where, {"fieldSelector": selector}, of_event))
            version = await self._kueue_version() if kueue != "disabled" else None
            if version is None and kueue == "enabled":
                log.warning("Kueue is not installed: what a queued job waits for cannot be explained")
            for namespace in self._namespaces if version else ():
                part = f"/namespaces/{namespace}" if namespace else ""
                where = f"/apis/{KUEUE_GROUP}/{version}{part}/workloads"
                group.create_task(self._follow(where, {"labelSelector": KUEUE_LABEL}, of_workload))

    async def _kueue_version(self) -> str | None:
        try:
            group = await self._cluster.request("GET", f"/apis/{KUEUE_GROUP}")
        except (ApiError, OSError, TimeoutError):
            return None
        return raw.text(group, "preferredVersion", "version") or None

    async def _follow(
        self, where: str, query: dict[str, str], read: Callable[[Raw], tuple[str, Notice] | None]
    ) -> None:
        failures = 0
        while True:
            try:
                async for event in self._cluster.watch(where, query, WATCH_SECONDS):
                    failures = 0
                    if event.get("type") in ("ADDED", "MODIFIED"):
                        self._take(read(raw.mapping(event, "object")))
            except (ApiError, OSError, TimeoutError, ValueError) as error:
                log.info("a watch of notices broke; it is started again", path=where, error=str(error)[:200])
                failures += 1
            await asyncio.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])

    def _take(self, found: tuple[str, Notice] | None) -> None:
        if found is None:
            return
        uid, notice = found
        if self._cache.note(uid, notice) and (key := self._cache.key_of_uid(uid)):
            self._on_news(key)
