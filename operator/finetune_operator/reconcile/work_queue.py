"""Which job to reconcile next: one at a time per key, no duplicates, exponential backoff, requeue after a while."""

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

log = structlog.get_logger(__name__)

Reconcile = Callable[[str], Awaitable["Result"]]


@dataclass(frozen=True)
class Result:
    """What a reconcile asks for: to be called again after `after` seconds; `blocked`: with pauses that grow each time
    until it is not. News of the job end the pause, but not that of a reconcile which raised (see Queue.add)."""

    after: float | None = None
    blocked: bool = False


@dataclass(frozen=True)
class Backoff:
    """Pauses after the n-th failure in a row (from 1): base * 2**(n-1), capped, with up to half of it as jitter."""

    base_seconds: float = 0.25
    cap_seconds: float = 30.0

    def pause(self, failures: int) -> float:
        full = min(self.cap_seconds, self.base_seconds * 2.0 ** min(failures - 1, 20))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 -- spreading load, not a secret


class Queue:
    """Keys wait here until a worker is free. `on_done` hears of every reconcile: (key, seconds, error or None)."""

    def __init__(
        self,
        reconcile: Reconcile,
        workers: int,
        backoff: Backoff | None = None,
        on_done: Callable[[str, float, Exception | None], None] = lambda key, seconds, error: None,
    ) -> None:
        self._reconcile = reconcile
        self._workers = workers
        self._backoff = backoff or Backoff()
        self._on_done = on_done
        self._ready: deque[str] = deque()
        self._waiting_since: dict[str, float] = {}
        self._running_since: dict[str, float] = {}
        self._again: dict[str, bool] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._failures: dict[str, int] = {}
        self._failing: set[str] = set()
        self._wake = asyncio.Semaphore(0)

    def add(self, key: str, changed: bool = False) -> None:
        """Reconcile `key` as soon as a worker is free; again afterwards when it is being reconciled right now.

        A key whose last turn failed keeps its pause: news of its pods do not make a server in trouble well. Only when
        the user `changed` the object itself is it tried at once, for the change may be what ends the failing.
        """
        if key in self._failing and not changed and key in self._timers:
            return
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._running_since:
            self._again[key] = changed or self._again.get(key, False)
        elif key not in self._waiting_since:
            self._waiting_since[key] = time.monotonic()
            self._ready.append(key)
            self._wake.release()

    def add_after(self, key: str, seconds: float) -> None:
        """Reconcile `key` in `seconds`, or before, should anything else ask for it."""
        due = asyncio.get_running_loop().time() + seconds
        if (timer := self._timers.get(key)) is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_at(due, self._fire, key)

    def _fire(self, key: str) -> None:
        del self._timers[key]
        self.add(key)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            await self._wake.acquire()
            key = self._ready.popleft()
            del self._waiting_since[key]
            began = self._running_since[key] = time.monotonic()
            error: Exception | None = None
            try:
                result = await self._reconcile(key)
            except Exception as raised:
                error, result = raised, Result(blocked=True)
            finally:
                del self._running_since[key]
            self._on_done(key, time.monotonic() - began, error)
            self._settle(key, result, failed=error is not None)

    def _settle(self, key: str, result: Result, failed: bool) -> None:
        """Plan the next turn of `key`."""
        again = self._again.pop(key, None)
        (self._failing.add if failed else self._failing.discard)(key)
        if result.blocked:
            self._failures[key] = failures = self._failures.get(key, 0) + 1
            pause = self._backoff.pause(failures)
            self.add_after(key, pause if result.after is None else min(pause, result.after))
            if again:
                self.add(key, changed=True)
            return
        self._failures.pop(key, None)
        if again is not None:
            self.add(key)
        elif result.after is not None:
            self.add_after(key, result.after)

    @property
    def depth(self) -> int:
        """Keys that wait for a worker."""
        return len(self._ready)

    @property
    def delayed(self) -> int:
        """Keys that wait for their time."""
        return len(self._timers)

    def longest_wait_seconds(self) -> float:
        """How long the oldest key has waited for a worker."""
        return _age(self._waiting_since)

    def longest_run_seconds(self) -> float:
        """How long the oldest reconcile has been running."""
        return _age(self._running_since)


def _age(since: dict[str, float]) -> float:
    """Seconds since the oldest; 0 where there is none. The dict keeps its order, so the first is the oldest."""
    first = next(iter(since.values()), None)
    return 0.0 if first is None else time.monotonic() - first
