"""The time of day: the median of three clocks, so that a step of one of them neither ends nor delays a deadline."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

#: Wait out a step back of up to this: ordinary corrections never show.
HOLD_SECONDS = 2.0


class Clock:
    """The median of the wall clock, the API server's clock and our last answer plus the time since then.

    A clock that steps alone is outvoted for as long as it differs. When the wall clock and the API server agree on
    another time, it counts at once. Before the first `observe`, time only advances from the wall clock at the start.
    """

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._wall, self._steady = wall, steady
        self._last, self._last_at = wall(), steady()
        self._server: tuple[float, float] | None = None

    def observe(self, date: str) -> None:
        """Record the Date header of an answer. Objects have their timestamps from the API server's clock."""
        now = self._steady()
        if self._server is not None and now - self._server[1] < 1.0:
            return
        try:
            server = parsedate_to_datetime(date).timestamp() + 0.5  # the header holds whole seconds
        except ValueError:
            return
        if self._server is None:
            self._last, self._last_at = server, now
        self._server = server, now

    def __call__(self) -> datetime:
        now = self._steady()
        carried = self._last + now - self._last_at
        if self._server is not None:
            server = self._server[0] + now - self._server[1]
            median = sorted((carried, self._wall(), server))[1]
            carried = self._last if self._last - HOLD_SECONDS < median < self._last else median
        self._last, self._last_at = carried, now
        return datetime.fromtimestamp(carried, UTC)
