"""Why pods wait, where their own status does not say: events (quota, volumes, Secrets) and Kueue's Workloads.

Both are watched with a field or label selector, from the present state on; a watch that breaks is started again, and
then replays older events in no order: of several about one object the one said last counts.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

import structlog

from finetune_operator.core.objects import raw
from finetune_operator.core.objects.observed import Notice
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.status.wait_reason import QUEUED
from finetune_operator.kube.client import ApiError, Cluster
from finetune_operator.kube.urls import path
from finetune_operator.watch.cache import Cache

log = structlog.get_logger(__name__)

#: The reasons that explain a wait, by the kind of object they are about.
EVENT_SELECTORS = (
    "involvedObject.kind=Job,reason=FailedCreate",
    "involvedObject.kind=Pod,reason=FailedMount",
    "involvedObject.kind=Pod,reason=FailedAttachVolume",
    "involvedObject.kind=Pod,reason=FailedCreatePodSandBox",
)
KUEUE_GROUP = "kueue.x-k8s.io"
KUEUE_LABEL = f"{KUEUE_GROUP}/job-uid"
WATCH_SECONDS = 240
_RETRY_SECONDS = (1, 2, 5, 10, 30)
#: Kueue may be installed later: while a job waits in a queue, it is looked for this often.
KUEUE_SECONDS = 30.0


@dataclass(frozen=True)
class Word:
    """What is said of object `uid`; or, taken back, no longer said."""

    uid: str
    notice: Notice
    is_over: bool = False


def of_event(obj: Raw, deleted: bool = False) -> Word | None:
    """What an event says of the object it is about. It is deleted when nobody has repeated it for an hour."""
    uid, reason = raw.text(obj, "involvedObject", "uid"), raw.text(obj, "reason")
    return Word(uid, Notice(reason, raw.text(obj, "message"), _said_at(obj)), deleted) if uid and reason else None


def _said_at(event: Raw) -> datetime | None:
    """When an event was repeated last, by whichever way its reporter counts."""
    places = (("series", "lastObservedTime"), ("lastTimestamp",), ("eventTime",), ("metadata", "creationTimestamp"))
    return max((moment for place in places if (moment := raw.moment(event, *place))), default=None)


def of_workload(obj: Raw, deleted: bool = False) -> Word | None:
    """What a Kueue Workload waits for, of its Job: quota, then admission checks."""
    uid = raw.labels(obj).get(KUEUE_LABEL, "")
    quota = _condition(obj, "QuotaReserved")
    if not uid or (not quota and not deleted):
        return None
    if deleted or raw.condition(obj, "Admitted"):
        return Word(uid, Notice(QUEUED, ""), is_over=True)
    if quota.get("status") != "True":
        return Word(uid, Notice(QUEUED, raw.text(quota, "message")))
    checks = "; ".join(_checks(obj))
    return Word(uid, Notice(QUEUED, f"quota is reserved; waiting for {checks or 'its admission'}"))


def _condition(obj: Raw, kind: str) -> Raw:
    return next((entry for entry in raw.entries(obj, "status", "conditions") if entry.get("type") == kind), {})


def _checks(workload: Raw) -> Iterator[str]:
    for check in raw.entries(workload, "status", "admissionChecks"):
        state, said = raw.text(check, "state"), raw.text(check, "message")
        if state != "Ready":
            yield f"admission check {raw.text(check, 'name')} ({state})" + (f": {said}" if said else "")


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
                if kueue != "disabled":
                    group.create_task(self._follow_kueue(namespace, is_expected=kueue == "enabled"))

    async def _follow_kueue(self, namespace: str | None, is_expected: bool) -> None:
        """Kueue's Workloads, also when it is installed, upgraded to another version or removed meanwhile."""
        part = f"/namespaces/{namespace}" if namespace else ""
        while True:
            if version := await self._kueue_version():
                where = f"/apis/{KUEUE_GROUP}/{version}{part}/workloads"
                await self._follow(where, {"labelSelector": KUEUE_LABEL}, of_workload, while_there=True)
            elif is_expected:
                log.warning("Kueue is not installed: what a queued job waits for cannot be explained")
            await asyncio.sleep(KUEUE_SECONDS)
            while not self._is_asked_for():  # noqa: ASYNC110 (a cluster without Kueue is left in peace)
                await asyncio.sleep(KUEUE_SECONDS)

    def _is_asked_for(self) -> bool:
        return any(job.phase == QUEUED for job in self._cache.jobs())

    async def _kueue_version(self) -> str | None:
        try:
            group = await self._cluster.request("GET", f"/apis/{KUEUE_GROUP}")
        except (ApiError, OSError, TimeoutError):
            return None
        return raw.text(group, "preferredVersion", "version") or None

    async def _follow(
        self,
        where: str,
        query: dict[str, str],
        read: Callable[[Raw, bool], Word | None],
        while_there: bool = False,
    ) -> None:
        """For ever; `while_there`: until there is nothing to watch at that path."""
        failures = 0
        while True:
            try:
                async for event in self._cluster.watch(where, query, WATCH_SECONDS):
                    failures = 0
                    if event.get("type") in ("ADDED", "MODIFIED", "DELETED"):
                        self._take(read(raw.mapping(event, "object"), event["type"] == "DELETED"))
            except (ApiError, OSError, TimeoutError, ValueError) as error:
                if while_there and isinstance(error, ApiError) and error.code == 404:
                    return
                log.info("a watch of notices broke; it is started again", path=where, error=str(error)[:200])
                failures += 1
            await asyncio.sleep(_RETRY_SECONDS[min(failures, len(_RETRY_SECONDS) - 1)])

    def _take(self, word: Word | None) -> None:
        if word is None:
            return
        if word.is_over:
            is_news = self._cache.take_back(word.uid, word.notice.reason, word.notice.message or None)
        else:
            is_news = self._cache.note(word.uid, word.notice)
        if is_news and (key := self._cache.key_of_uid(word.uid)):
            self._on_news(key)
