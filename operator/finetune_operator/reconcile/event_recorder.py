"""Post events in the background, so that no reconcile waits for them."""

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from finetune_api import constants
from finetune_operator.core.objects import kinds
from finetune_operator.core.objects.kinds import Kind
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.objects.snapshot import ReconciledView
from finetune_operator.core.status.events import Event
from finetune_operator.kube.client import OWNED, KubeClient
from finetune_operator.kube.errors import ApiError
from finetune_operator.kube.urls import path
from finetune_operator.observability.metrics import Metrics

log = structlog.get_logger(__name__)

QUEUE_LENGTH = 20_000
POSTERS = 2
#: While jobs wait for a worker, events wait too, but no longer than this: reconciles come first.
YIELD_SECONDS = 30.0
MAX_MESSAGE = 1024
_TRIES = 4


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """An event to post. It holds only what the event needs, because thousands may wait."""

    kind: Kind
    namespace: str
    name: str
    uid: str
    event: Event
    at: datetime
    since: float


def manifest(pending: PendingEvent) -> Raw:
    """Return the core/v1 Event. Its name follows from its subject, so that posting it twice makes one event."""
    event = pending.event
    digest = hashlib.sha256(f"{pending.uid}/{event.subject}".encode()).hexdigest()[:16]
    stamp = pending.at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{pending.name}.{digest}", "namespace": pending.namespace},
        "involvedObject": {
            "apiVersion": pending.kind.api_version,
            "kind": pending.kind.name,
            "name": pending.name,
            "namespace": pending.namespace,
            "uid": pending.uid,
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


class EventRecorder:
    """A bounded queue of events. Events are for people: when too many wait, the newest are dropped and counted.

    `is_busy` tells whether jobs wait for a worker; events wait for them `yield_seconds` at most.
    """

    def __init__(
        self,
        client: KubeClient,
        metrics: Metrics,
        is_busy: Callable[[], bool] = lambda: False,
        yield_seconds: float = YIELD_SECONDS,
    ) -> None:
        self._client, self._metrics, self._is_busy, self._yield_seconds = client, metrics, is_busy, yield_seconds
        self._queue: asyncio.Queue[PendingEvent] = asyncio.Queue(QUEUE_LENGTH)
        self._posting = 0

    @property
    def depth(self) -> int:
        """The number of events that are not posted yet."""
        return self._queue.qsize() + self._posting

    def post(self, kind: Kind, owner: ReconciledView, event: Event, now: datetime) -> None:
        """Queue an event about an object of that kind."""
        pending = PendingEvent(kind, owner.namespace, owner.name, owner.uid, event, now, time.monotonic())
        try:
            self._queue.put_nowait(pending)
        except asyncio.QueueFull:
            self._metrics.events_dropped.inc()

    async def run(self) -> None:
        """Post until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(POSTERS):
                group.create_task(self._work())

    async def flush(self, seconds: float) -> None:
        """Wait until all queued events are posted, at most `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._queue.join()
        except TimeoutError:
            log.info("dropping events at shutdown", count=self._queue.qsize())

    async def _work(self) -> None:
        while True:
            pending = await self._queue.get()
            self._posting += 1
            try:
                while self._is_busy() and time.monotonic() - pending.since < self._yield_seconds:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)
                await self._send(manifest(pending))
            finally:
                self._posting -= 1
                self._queue.task_done()

    async def _send(self, event: Raw) -> None:
        for attempt in range(_TRIES):
            try:
                await self._client.send("POST", path(kinds.EVENT, event["metadata"]["namespace"]), event, OWNED)
                return
            except ApiError as error:
                if error.code == 409:
                    return  # posted already
                if error.code < 500 and error.code != 429:
                    log.info("event denied", reason=event["reason"], code=error.code)
                    return
            except (OSError, TimeoutError):
                pass
            await asyncio.sleep(0.5 * 2**attempt)
        self._metrics.events_dropped.inc()
