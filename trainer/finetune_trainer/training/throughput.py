"""Throughput: real tokens per second of training time, evaluation and checkpoints left out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Throughput:
    """Counts tokens and seconds; `interval` returns what came since its last call."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    _interval: tuple[int, float, int] = (0, 0.0, 0)
    _snapshot: tuple[int, float] = (0, 0.0)
    _running_since: float | None = None

    def start(self) -> None:
        if self._running_since is None:
            self._running_since = time.monotonic()

    def stop(self) -> None:
        if self._running_since is not None:
            self.seconds += time.monotonic() - self._running_since
            self._running_since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of this block."""
        was_running = self._running_since is not None
        self.stop()
        try:
            yield
        finally:
            if was_running:
                self.start()

    def snapshot(self) -> None:
        """Remember this moment, the end of a step."""
        self._settle()
        self._snapshot = self.tokens, self.seconds

    def rewind(self) -> None:
        """Forget what came since the snapshot: a step that was begun and abandoned."""
        self._settle()
        self.tokens, self.seconds = self._snapshot

    def interval(self) -> tuple[int, float, int]:
        """Tokens, seconds and steps since the last call."""
        self._settle()
        before, now = self._interval, (self.tokens, self.seconds, self.steps)
        self._interval = now
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    def _settle(self) -> None:
        if self._running_since is not None:
            self.stop()
            self.start()
