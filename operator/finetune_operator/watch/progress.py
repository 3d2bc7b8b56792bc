"""Poll /progress of the running trainers, with a minimum interval and a limit on concurrent requests."""

import asyncio
import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
from pydantic import ValidationError

from finetune_api import constants
from finetune_api.status import TrainerReport
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.watch import bounded_http

log = structlog.get_logger(__name__)

#: Poll a trainer that has not answered yet this often: it has just started.
EAGER_SECONDS = 2.0
#: A trainer is silent after so many polls in a row without a report.
SILENT_POLLS = 3
#: A silent trainer is polled less and less often, down to once in so many intervals: it must not take others' turns.
SLOWEST = 8


@dataclass
class _Trainer:
    pod_uid: str
    ip: str
    heard_at: datetime
    """When it last answered; before its first answer, when it was first polled."""
    report: TrainerReport | None = None
    missed: int = 0
    """Polls without a report since then."""


class ProgressPoller:
    """Polls one rank-0 pod per job; `on_change` gets the key when its report changes, or when it falls silent."""

    def __init__(
        self,
        interval: float,
        timeout: float,
        concurrency: int,
        on_change: Callable[[ObjectKey], None],
        port: int | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._interval, self._timeout = interval, timeout
        self._slots = asyncio.Semaphore(concurrency)
        self._on_change, self._clock = on_change, clock
        self._port = port or constants.TRAINER_PORT
        self._trainers: dict[ObjectKey, _Trainer] = {}
        self._order = itertools.count()
        self._due: list[tuple[float, int, ObjectKey, str]] = []
        self._wake = asyncio.Event()

    def follow(self, key: ObjectKey, pod_uid: str, ip: str) -> None:
        """Poll that pod from now on, and forget the report of any other pod of the job."""
        known = self._trainers.get(key)
        if known is None or (known.pod_uid, known.ip) != (pod_uid, ip):
            self._trainers[key] = _Trainer(pod_uid, ip, self._clock())
            self._schedule(key, pod_uid, 0)

    def unfollow(self, key: ObjectKey) -> None:
        """Stop polling."""
        self._trainers.pop(key, None)

    def report(self, key: ObjectKey) -> TrainerReport | None:
        """Return the latest report of the followed trainer."""
        known = self._trainers.get(key)
        return known.report if known else None

    def silent_since(self, key: ObjectKey) -> datetime | None:
        """Return when the followed trainer last answered; None while it answers."""
        known = self._trainers.get(key)
        return known.heard_at if known and known.missed >= SILENT_POLLS else None

    def reports(self) -> Iterator[tuple[ObjectKey, TrainerReport]]:
        return ((key, trainer.report) for key, trainer in self._trainers.items() if trainer.report)

    def _schedule(self, key: ObjectKey, pod_uid: str, seconds: float) -> None:
        due = asyncio.get_running_loop().time() + seconds
        heapq.heappush(self._due, (due, next(self._order), key, pod_uid))
        self._wake.set()

    async def run(self) -> None:
        """Poll until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._sleep()
                _, _, key, pod_uid = heapq.heappop(self._due)
                trainer = self._trainers.get(key)
                if trainer and trainer.pod_uid == pod_uid:
                    await self._slots.acquire()
                    group.create_task(self._turn(key, trainer))

    async def _sleep(self) -> None:
        """Until the first one is due."""
        while True:
            self._wake.clear()
            left = self._due[0][0] - asyncio.get_running_loop().time() if self._due else None
            if left is not None and left <= 0:
                return
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                return

    async def _turn(self, key: ObjectKey, trainer: _Trainer) -> None:
        try:
            report = await self._ask(key, trainer)
        finally:
            self._slots.release()
        if self._trainers.get(key) is not trainer:
            return
        if self._take(trainer, report):
            self._on_change(key)
        self._schedule(key, trainer.pod_uid, self._pause(trainer))

    def _pause(self, trainer: _Trainer) -> float:
        """Return the seconds until the next poll."""
        if trainer.missed >= SILENT_POLLS:
            return self._interval * min(SLOWEST, 2.0 ** min(trainer.missed - SILENT_POLLS, 10))
        return self._interval if trainer.report else min(EAGER_SECONDS, self._interval)

    def _take(self, trainer: _Trainer, report: TrainerReport | None) -> bool:
        """Keep the outcome of a poll; return whether it is news."""
        if report is None:
            trainer.missed += 1
            return trainer.missed == SILENT_POLLS
        is_news = report != trainer.report or trainer.missed >= SILENT_POLLS
        trainer.report, trainer.missed, trainer.heard_at = report, 0, self._clock()
        return is_news

    async def _ask(self, key: ObjectKey, trainer: _Trainer) -> TrainerReport | None:
        try:
            body = await bounded_http.get(trainer.ip, self._port, "/progress", self._timeout)
            return TrainerReport.model_validate_json(body)
        except bounded_http.BadAnswer as error:
            log.debug("trainer progress is no answer; ignoring it", key=str(key), ip=trainer.ip, error=str(error))
        except (TimeoutError, OSError) as error:
            log.debug("trainer does not answer; retrying", key=str(key), ip=trainer.ip, error=type(error).__name__)
        except ValidationError:
            log.warning("trainer progress is unreadable; ignoring it", key=str(key), ip=trainer.ip)
        return None
