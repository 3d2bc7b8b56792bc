"""The time of day: the median of three clocks, so that none of them alone can undo a deadline or bring it about."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

#: A step back this small is waited out instead, so that ordinary corrections never show.
HOLD_SECONDS = 2.0


class Clock:
    """The median of the wall clock, the API server's clock (`hear`) and what was last said plus the time since then.

    One clock that steps is outvoted for as long as it stands apart. When the wall clock and the API server agree that
    the time is another, they are believed at once. Until the API server has been heard, time only passes.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._said, self._said_at = wall(), steady()
        self._heard: tuple[float, float] | None = None

    def hear(self, date: str) -> None:
        """Take in the Date header of an answer of the API server, whose time all timestamps of objects are in."""
        now = self._steady()
        if self._heard is not None and now - self._heard[1] < 1.0:
            return
        try:
            there = parsedate_to_datetime(date).timestamp() + 0.5  # it is cut to whole seconds
        except ValueError:
            return
        if self._heard is None:
            self._said, self._said_at = there, now
        self._heard = there, now

    def __call__(self) -> datetime:
        now = self._steady()
        carried = self._said + now - self._said_at
        if self._heard is not None:
            there = self._heard[0] + now - self._heard[1]
            median = sorted((carried, self._wall(), there))[1]
            carried = self._said if self._said - HOLD_SECONDS < median < self._said else median
        self._said, self._said_at = carried, now
        return datetime.fromtimestamp(carried, UTC)
