"""Read running trainers' /progress: each at most every so often, so many at a time."""

import asyncio
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import aiohttp
import structlog
from pydantic import ValidationError

from finetune_api import constants
from finetune_api.status import TrainerReport

log = structlog.get_logger(__name__)

MAX_BYTES = 64 * 1024
#: A trainer that has not answered yet is asked this often, for it has just started.
EAGER_SECONDS = 2.0


@dataclass
class _Trainer:
    pod_uid: str
    ip: str
    report: TrainerReport | None = None
    asking: bool = False


class Poller:
    """Follows one rank-0 pod per job. `on_news` is called with the key when its trainer says something new."""

    def __init__(
        self, interval: float, timeout: float, concurrency: int, on_news: Callable[[str], None], port: int | None = None
    ) -> None:
        self._interval, self._timeout = interval, aiohttp.ClientTimeout(total=timeout)
        self._slots = asyncio.Semaphore(concurrency)
        self._on_news = on_news
        self._port = port or constants.TRAINER_PORT
        self._trainers: dict[str, _Trainer] = {}
        self._due: list[tuple[float, str, str]] = []
        self._wake = asyncio.Event()

    def follow(self, key: str, pod_uid: str, ip: str) -> None:
        """Ask the trainer in that pod from now on; what another pod of the job said before is forgotten."""
        known = self._trainers.get(key)
        if known is None or (known.pod_uid, known.ip) != (pod_uid, ip):
            self._trainers[key] = _Trainer(pod_uid, ip)
            self._schedule(key, pod_uid, 0)

    def leave(self, key: str) -> None:
        """Stop asking."""
        self._trainers.pop(key, None)

    def report(self, key: str) -> TrainerReport | None:
        """What the followed trainer last said."""
        known = self._trainers.get(key)
        return known.report if known else None

    def reports(self) -> Iterator[tuple[str, TrainerReport]]:
        return ((key, trainer.report) for key, trainer in self._trainers.items() if trainer.report)

    def _schedule(self, key: str, pod_uid: str, seconds: float) -> None:
        heapq.heappush(self._due, (asyncio.get_running_loop().time() + seconds, key, pod_uid))
        self._wake.set()

    async def run(self) -> None:
        """Ask until cancelled."""
        async with (
            aiohttp.ClientSession(timeout=self._timeout, trust_env=False) as session,
            asyncio.TaskGroup() as group,
        ):
            while True:
                await self._sleep()
                _, key, pod_uid = heapq.heappop(self._due)
                trainer = self._trainers.get(key)
                if trainer and trainer.pod_uid == pod_uid:
                    await self._slots.acquire()
                    group.create_task(self._turn(session, key, trainer))

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

    async def _turn(self, session: aiohttp.ClientSession, key: str, trainer: _Trainer) -> None:
        try:
            report = await self._ask(session, key, trainer)
        finally:
            self._slots.release()
        if self._trainers.get(key) is not trainer:
            return
        if report is not None and report != trainer.report:
            trainer.report = report
            self._on_news(key)
        self._schedule(key, trainer.pod_uid, self._interval if trainer.report else min(EAGER_SECONDS, self._interval))

    async def _ask(self, session: aiohttp.ClientSession, key: str, trainer: _Trainer) -> TrainerReport | None:
        host = f"[{trainer.ip}]" if ":" in trainer.ip else trainer.ip
        try:
            async with session.get(f"http://{host}:{self._port}/progress", allow_redirects=False) as answer:
                if answer.status != 200:
                    return None
                body = b""
                async for chunk in answer.content.iter_chunked(MAX_BYTES):
                    body += chunk
                    if len(body) > MAX_BYTES:
                        log.warning("the trainer's progress is too long", key=key, ip=trainer.ip)
                        return None
                return TrainerReport.model_validate_json(body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.debug("the trainer does not answer", key=key, ip=trainer.ip, error=type(error).__name__)
        except ValidationError:
            log.warning("the trainer's progress cannot be read", key=key, ip=trainer.ip)
        return None
