"""Post events on FineTuneJobs, beside the reconciles, so that none of them waits for it."""

import asyncio
import hashlib
from datetime import UTC, datetime

import structlog

from finetune_api import names
from finetune_operator.cluster import METADATA_ONLY, ApiError, Cluster, path
from finetune_operator.core.events import Event
from finetune_operator.core.observed import JobObject
from finetune_operator.core.raw import Raw
from finetune_operator.metrics import Metrics

log = structlog.get_logger(__name__)

QUEUE_LENGTH = 5_000
POSTERS = 2
MAX_MESSAGE = 1024
_TRIES = 4


def manifest(job: JobObject, event: Event, now: datetime) -> Raw:
    """The core/v1 Event. Its name follows from what it is about, so that posting it twice is one event."""
    digest = hashlib.sha256(f"{job.uid}/{event.about}".encode()).hexdigest()[:16]
    stamp = now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{job.name}.{digest}", "namespace": job.namespace},
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:MAX_MESSAGE],
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "reportingInstance": names.FIELD_MANAGER,
        "firstTimestamp": stamp,
        "lastTimestamp": stamp,
        "count": 1,
    }


class Recorder:
    """A bounded queue of events. Events are for people: when too many wait, the newest are dropped and counted."""

    def __init__(self, cluster: Cluster, metrics: Metrics) -> None:
        self._cluster, self._metrics = cluster, metrics
        self._queue: asyncio.Queue[Raw] = asyncio.Queue(QUEUE_LENGTH)

    def post(self, job: JobObject, event: Event, now: datetime) -> None:
        """Post it soon."""
        try:
            self._queue.put_nowait(manifest(job, event, now))
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
            event = await self._queue.get()
            try:
                await self._send(event)
            finally:
                self._queue.task_done()

    async def _send(self, event: Raw) -> None:
        for attempt in range(_TRIES):
            try:
                where = path("Event", event["metadata"]["namespace"])
                await self._cluster.request("POST", where, event, accept=METADATA_ONLY)
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
