"""Throughput: real tokens per second of training time, evaluation and checkpoints left out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Throughput:
    """Counts tokens and seconds; `lap` returns what came since the last lap."""

    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0
    _lap: tuple[int, float, int] = (0, 0.0, 0)
    _mark: tuple[int, float] = (0, 0.0)
    _running_since: float | None = None

    def start(self) -> None:
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

    def mark(self) -> None:
        """Remember this moment, the end of a step."""
        self._settle()
        self._mark = self.tokens, self.seconds

    def rewind(self) -> None:
        """Forget what came since the mark: a step that was begun and given up."""
        self._settle()
        self.tokens, self.seconds = self._mark

    def lap(self) -> tuple[int, float, int]:
        """Tokens, seconds and steps since the last call."""
        self._settle()
        before, now = self._lap, (self.tokens, self.seconds, self.steps)
        self._lap = now
        return now[0] - before[0], now[1] - before[1], now[2] - before[2]

    def _settle(self) -> None:
        if self._running_since is not None:
            self.stop()
            self.start()
