"""Watch why pods wait where their own status does not say: events (quota, volumes, Secrets) and Kueue's Workloads.

Each watch starts with the present state. A watch that restarts replays older events in any order: of several about one
object, the latest counts.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from finetune_operator.core.objects import kinds, raw
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import JobObject, WaitReason
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.status.conditions import MAX_MESSAGE
from finetune_operator.core.status.wait_reason import QUEUED
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.errors import ApiError
from finetune_operator.kube.urls import path
from finetune_operator.watch.cache import Cache

log = structlog.get_logger(__name__)

#: The events that explain a wait.
EVENT_SELECTORS = (
    "involvedObject.kind=Job,reason=FailedCreate",
    "involvedObject.kind=Pod,reason=FailedMount",
    "involvedObject.kind=Pod,reason=FailedAttachVolume",
    "involvedObject.kind=Pod,reason=FailedCreatePodSandBox",
)
KUEUE_GROUP = "kueue.x-k8s.io"
KUEUE_LABEL = f"{KUEUE_GROUP}/job-uid"
WATCH_SECONDS = 240
RETRY_SECONDS = (1.0, 2, 5, 10, 30)
#: Kueue may be installed later: while a job waits in a queue, look for it this often.
KUEUE_SECONDS = 30.0


@dataclass(frozen=True)
class WaitReasonUpdate:
    """Why object `uid` waits, as told in `namespace`; or, with `is_retracted`, that this reason is gone."""

    namespace: str
    uid: str
    reason: WaitReason
    is_retracted: bool = False


def from_event(obj: Raw, deleted: bool = False) -> WaitReasonUpdate | None:
    """Read why the involved object of an event waits. An event expires when nobody repeats it for an hour."""
    uid, reason = raw.text(obj, "involvedObject", "uid"), raw.text(obj, "reason")
    if not uid or not reason:
        return None
    why = WaitReason(reason, raw.text(obj, "message")[:MAX_MESSAGE], _last_repeated(obj))
    return WaitReasonUpdate(raw.text(obj, "metadata", "namespace"), uid, why, deleted)


def _last_repeated(event: Raw) -> datetime | None:
    """Return when an event was last repeated; reporters count in different fields."""
    paths = (("series", "lastObservedTime"), ("lastTimestamp",), ("eventTime",), ("metadata", "creationTimestamp"))
    return max((moment for place in paths if (moment := raw.timestamp(event, *place))), default=None)


def from_workload(obj: Raw, deleted: bool = False) -> WaitReasonUpdate | None:
    """Read what the Job of a Kueue Workload waits for: quota, then admission checks."""
    uid = raw.labels(obj).get(KUEUE_LABEL, "")
    quota = _condition(obj, "QuotaReserved")
    if not uid or (not quota and not deleted):
        return None
    message = ""
    is_over = deleted or bool(raw.condition(obj, "Admitted"))
    if not is_over and quota.get("status") != "True":
        message = raw.text(quota, "message")
    elif not is_over:
        message = f"quota is reserved; waiting for {'; '.join(_checks(obj)) or 'its admission'}"
    why = WaitReason(QUEUED, message[:MAX_MESSAGE])
    return WaitReasonUpdate(raw.text(obj, "metadata", "namespace"), uid, why, is_over)


def _condition(obj: Raw, kind: str) -> Raw:
    return next((entry for entry in raw.entries(obj, "status", "conditions") if entry.get("type") == kind), {})


def _checks(workload: Raw) -> Iterator[str]:
    for check in raw.entries(workload, "status", "admissionChecks"):
        state, said = raw.text(check, "state"), raw.text(check, "message")
        if state != "Ready":
            yield f"admission check {raw.text(check, 'name')} ({state})" + (f": {said}" if said else "")


class WaitReasonWatcher:
    """Keeps the wait reasons in the cache up to date; `on_change` is called with each key that they change."""

    def __init__(
        self,
        client: KubeClient,
        cache: Cache,
        namespaces: tuple[str, ...],
        on_change: Callable[[ObjectKey], None],
        retry_seconds: Sequence[float] = RETRY_SECONDS,
        kueue_seconds: float = KUEUE_SECONDS,
    ) -> None:
        self._client, self._cache, self._on_change = client, cache, on_change
        self._retry_seconds, self._kueue_seconds = retry_seconds, kueue_seconds
        self._namespaces: tuple[str | None, ...] = namespaces or (None,)

    async def run(self, kueue: str) -> None:
        """Watch until cancelled. `kueue`: auto, enabled or disabled."""
        async with asyncio.TaskGroup() as group:
            for namespace in self._namespaces:
                for selector in EVENT_SELECTORS:
                    where = path(kinds.EVENT, namespace)
                    group.create_task(self._follow(where, {"fieldSelector": selector}, from_event))
                if kueue != "disabled":
                    group.create_task(self._follow_kueue(namespace, is_expected=kueue == "enabled"))

    async def _follow_kueue(self, namespace: str | None, is_expected: bool) -> None:
        """Watch Kueue's Workloads; Kueue may be installed, upgraded to another version or removed meanwhile."""
        part = f"/namespaces/{namespace}" if namespace else ""
        while True:
            if version := await self._kueue_version():
                where = f"/apis/{KUEUE_GROUP}/{version}{part}/workloads"
                await self._follow(where, {"labelSelector": KUEUE_LABEL}, from_workload, while_there=True)
            elif is_expected:
                log.warning("Kueue is not installed; cannot explain why queued jobs wait")
            await asyncio.sleep(self._kueue_seconds)
            while not self._has_queued_jobs():  # noqa: ASYNC110 (a cluster without Kueue gets no requests)
                await asyncio.sleep(self._kueue_seconds)

    def _has_queued_jobs(self) -> bool:
        return any(job.phase == QUEUED for job in self._cache.owners(JobObject))

    async def _kueue_version(self) -> str | None:
        try:
            group = await self._client.request("GET", f"/apis/{KUEUE_GROUP}")
        except (ApiError, OSError, TimeoutError):
            return None
        return raw.text(group, "preferredVersion", "version") or None

    async def _follow(
        self,
        where: str,
        query: dict[str, str],
        read: Callable[[Raw, bool], WaitReasonUpdate | None],
        while_there: bool = False,
    ) -> None:
        """Watch `where` without end; with `while_there`, until the API server answers 404."""
        failures = 0
        while True:
            try:
                async for event in self._client.watch(where, query, WATCH_SECONDS):
                    failures = 0
                    if event.get("type") in ("ADDED", "MODIFIED", "DELETED"):
                        self.apply(read(raw.mapping(event, "object"), event["type"] == "DELETED"))
            except (ApiError, OSError, TimeoutError, ValueError) as error:
                if while_there and isinstance(error, ApiError) and error.code == 404:
                    return
                log.info("watch of wait reasons failed; retrying", path=where, error=str(error)[:200])
                failures += 1
            await asyncio.sleep(self._retry_seconds[min(failures, len(self._retry_seconds) - 1)])

    def apply(self, update: WaitReasonUpdate | None) -> None:
        """Put one update into the cache, and queue the jobs it changes."""
        if update is None:
            return
        where, uid, reason = update.namespace, update.uid, update.reason
        if update.is_retracted:
            changed = self._cache.retract(where, uid, reason.reason, reason.message or None)
        else:
            changed = self._cache.set_wait_reason(where, uid, reason)
        for key in self._cache.keys_of_uid(uid) if changed else ():
            if key.namespace == where:
                self._on_change(key)
