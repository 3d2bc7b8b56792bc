"""The time of day, never going back: a clock that is set back must not undo a deadline or a backoff."""

import time
from collections.abc import Callable
from datetime import UTC, datetime


class Clock:
    """Follows the wall clock when that is ahead, and the monotonic clock when the wall clock falls behind."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._read = wall
        self._wall = wall()
        self._steady = time.monotonic()

    def __call__(self) -> datetime:
        steady = time.monotonic()
        self._wall = max(self._read(), self._wall + steady - self._steady)
        self._steady = steady
        return datetime.fromtimestamp(self._wall, UTC)
