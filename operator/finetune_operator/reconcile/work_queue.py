"""A work queue like client-go's: one worker per key, no duplicates, exponential backoff, delayed requeue.

Namespaces take turns: one with ten thousand jobs delays another's by one reconcile, not by ten thousand.
"""

import asyncio
import random
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from finetune_operator.core.objects.kinds import ObjectKey

Reconcile = Callable[[ObjectKey], Awaitable["Result"]]

#: A namespace's blocked keys together are tried again about so often: each try costs the API server a refused write.
BLOCKED_PER_SECOND = 2.0


@dataclass(frozen=True)
class Result:
    """When to reconcile again.

    Attributes:
        after: Seconds to wait; None waits for the next event.
        blocked: Wait longer each time, until a reconcile is no longer blocked, and the longer the more keys of the
            namespace are blocked. An event of the object ends the wait, except after a reconcile that raised (see
            WorkQueue.add).
    """

    after: float | None = None
    blocked: bool = False


@dataclass(frozen=True)
class Backoff:
    """Pauses after the n-th failure in a row (from 1): base * 2**(n-1), capped, with up to half of it as jitter."""

    base_seconds: float = 0.25
    cap_seconds: float = 30.0

    def pause(self, failures: int, least: float = 0.0) -> float:
        full = max(least, min(self.cap_seconds, self.base_seconds * 2.0 ** min(failures - 1, 20)))
        return full * random.uniform(0.5, 1.0)  # noqa: S311 -- spreading load, not a secret


class WorkQueue:
    """Keys wait here until a worker is free. `on_done` gets (key, seconds, error or None) after each reconcile."""

    def __init__(
        self,
        reconcile: Reconcile,
        workers: int,
        backoff: Backoff | None = None,
        on_done: Callable[[ObjectKey, float, Exception | None], None] = lambda key, seconds, error: None,
    ) -> None:
        self._reconcile = reconcile
        self._workers = workers
        self._backoff = backoff or Backoff()
        self._on_done = on_done
        self._ready: OrderedDict[str, deque[ObjectKey]] = OrderedDict()
        """By namespace; the first one's turn is next."""
        self._waiting_since: dict[ObjectKey, float] = {}
        self._running_since: dict[ObjectKey, float] = {}
        self._again: dict[ObjectKey, bool] = {}
        self._timers: dict[ObjectKey, asyncio.TimerHandle] = {}
        self._failures: dict[ObjectKey, int] = {}
        self._failing: set[ObjectKey] = set()
        self._blocked: defaultdict[str, set[ObjectKey]] = defaultdict(set)
        """By namespace; without those whose reconcile raised."""
        self._wake = asyncio.Semaphore(0)

    def add(self, key: ObjectKey, changed: bool = False) -> None:
        """Reconcile `key` as soon as a worker is free, and once more if it is being reconciled now.

        A key whose last reconcile failed keeps its pause: an event of its pods does not end a server's trouble. Only
        when the user `changed` the object itself it is retried at once, because the change may end the failure.
        """
        if key in self._failing and not changed and key in self._timers:
            return
        if timer := self._timers.pop(key, None):
            timer.cancel()
        if key in self._running_since:
            self._again[key] = changed or self._again.get(key, False)
        elif key not in self._waiting_since:
            self._waiting_since[key] = time.monotonic()
            self._ready.setdefault(key.namespace, deque()).append(key)
            self._wake.release()

    def add_after(self, key: ObjectKey, seconds: float) -> None:
        """Reconcile `key` in `seconds`, or earlier if anything else adds it."""
        due = asyncio.get_running_loop().time() + seconds
        if (timer := self._timers.get(key)) is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_at(due, self._fire, key)

    def _fire(self, key: ObjectKey) -> None:
        del self._timers[key]
        self.add(key)

    async def run(self) -> None:
        """Run the workers until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._workers):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            await self._wake.acquire()
            key = self._next()
            del self._waiting_since[key]
            started = self._running_since[key] = time.monotonic()
            error: Exception | None = None
            try:
                result = await self._reconcile(key)
            except Exception as raised:
                error, result = raised, Result(blocked=True)
            finally:
                del self._running_since[key]
            self._on_done(key, time.monotonic() - started, error)
            self._settle(key, result, failed=error is not None)
            # A reconcile that needs no request never waits: thousands of them in a row would stop watches and probes.
            await asyncio.sleep(0)

    def _next(self) -> ObjectKey:
        """Take the oldest key of the namespace whose turn it is."""
        namespace, keys = self._ready.popitem(last=False)
        key = keys.popleft()
        if keys:
            self._ready[namespace] = keys
        return key

    def _settle(self, key: ObjectKey, result: Result, failed: bool) -> None:
        """Schedule the next reconcile of `key`."""
        again = self._again.pop(key, None)
        (self._failing.add if failed else self._failing.discard)(key)
        blocked = self._blocked[key.namespace]
        (blocked.add if result.blocked and not failed else blocked.discard)(key)
        if not blocked:
            del self._blocked[key.namespace]
        if result.blocked:
            self._failures[key] = failures = self._failures.get(key, 0) + 1
            pause = self._backoff.pause(failures, 0.0 if failed else (len(blocked) - 1) / BLOCKED_PER_SECOND)
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
        """The number of keys that wait for a worker."""
        return len(self._waiting_since)

    @property
    def delayed(self) -> int:
        """The number of keys that wait for their time."""
        return len(self._timers)

    def longest_wait_seconds(self) -> float:
        """Return how long the oldest key has waited for a worker."""
        return _age(self._waiting_since)

    def longest_run_seconds(self) -> float:
        """Return how long the oldest reconcile has been running."""
        return _age(self._running_since)


def _age(since: dict[ObjectKey, float]) -> float:
    """Return the seconds since the first entry, which is the oldest; 0 where there is none."""
    first = next(iter(since.values()), None)
    return 0.0 if first is None else time.monotonic() - first
