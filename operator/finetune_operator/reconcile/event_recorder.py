"""Post events on FineTuneJobs, beside the reconciles, so that none of them waits for it."""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from finetune_api import constants
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.status.events import Event
from finetune_operator.kube.client import ApiError, Cluster
from finetune_operator.kube.urls import path
from finetune_operator.observability.metrics import Metrics

log = structlog.get_logger(__name__)

QUEUE_LENGTH = 20_000
POSTERS = 2
#: While jobs wait for a worker, events wait too, for this long at most: what jobs need comes before what is said of it.
YIELD_SECONDS = 30.0
MAX_MESSAGE = 1024
_TRIES = 4


@dataclass(frozen=True, slots=True)
class Waiting:
    """An event to post. Of the job only what the event needs, for thousands may wait."""

    namespace: str
    name: str
    uid: str
    event: Event
    at: datetime
    since: float


def manifest(waiting: Waiting) -> Raw:
    """The core/v1 Event. Its name follows from what it is about, so that posting it twice is one event."""
    event = waiting.event
    digest = hashlib.sha256(f"{waiting.uid}/{event.about}".encode()).hexdigest()[:16]
    stamp = waiting.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{waiting.name}.{digest}", "namespace": waiting.namespace},
        "involvedObject": {
            "apiVersion": constants.API_VERSION,
            "kind": constants.KIND,
            "name": waiting.name,
            "namespace": waiting.namespace,
            "uid": waiting.uid,
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:MAX_MESSAGE],
        "source": {"component": constants.FIELD_MANAGER},
        "reportingComponent": constants.FIELD_MANAGER,
        "reportingInstance": constants.FIELD_MANAGER,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }


class Recorder:
    """A bounded queue of events. Events are for people: when too many wait, the newest are dropped and counted.

    `is_busy` says whether jobs wait for a worker.
    """

    def __init__(self, cluster: Cluster, metrics: Metrics, is_busy: Callable[[], bool] = lambda: False) -> None:
        self._cluster, self._metrics, self._is_busy = cluster, metrics, is_busy
        self._queue: asyncio.Queue[Waiting] = asyncio.Queue(QUEUE_LENGTH)
        self._posting = 0

    @property
    def depth(self) -> int:
        """Events that are not posted yet."""
        return self._queue.qsize() + self._posting

    def post(self, job: JobObject, event: Event, now: datetime) -> None:
        """Post it soon."""
        try:
            self._queue.put_nowait(Waiting(job.namespace, job.name, job.uid, event, now, time.monotonic()))
        except asyncio.QueueFull:
            self._metrics.events_dropped.inc()

    async def run(self) -> None:
        """Post until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(POSTERS):
                group.create_task(self._work())

    async def flush(self, seconds: float) -> None:
        """Wait until all that wait are posted, at most `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._queue.join()
        except TimeoutError:
            log.info("events were not posted before the end", count=self._queue.qsize())

    async def _work(self) -> None:
        while True:
            waiting = await self._queue.get()
            self._posting += 1
            try:
                while self._is_busy() and time.monotonic() - waiting.since < YIELD_SECONDS:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                await self._send(manifest(waiting))
            finally:
                self._posting -= 1
                self._queue.task_done()

    async def _send(self, event: Raw) -> None:
        for attempt in range(_TRIES):
            try:
                await self._cluster.send("POST", path("Event", event["metadata"]["namespace"]), event)
                return
            except ApiError as error:
                if error.code == 409:
                    return  # posted already
                if error.code < 500 and error.code != 429:
                    log.info("an event was refused", reason=event["reason"], code=error.code)
                    return
            except (OSError, TimeoutError):
                pass
            await asyncio.sleep(0.5 * 2**attempt)
        self._metrics.events_dropped.inc()
