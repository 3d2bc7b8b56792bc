"""Where the time goes between the start of the process and the first step."""

import time
from pathlib import Path
from typing import Final

import structlog

log = structlog.get_logger(__name__)
_TICKS_PER_SECOND: Final = 100  # of /proc, on all of Linux


class StartClock:
    """Seconds of each part of the start, told in one line of the log when the first step is done.

    Attributes:
        told: Whether that was said.
    """

    def __init__(self) -> None:
        self._began = self._last = process_began()
        self._parts: dict[str, float] = {}
        self.told = False
        self.lap("process")

    def lap(self, part: str) -> None:
        """Count the time since the last lap as that of `part`."""
        now = time.monotonic()
        self._parts[part] = self._parts.get(part, 0.0) + now - self._last
        self._last = now

    def tell(self) -> None:
        """Log the seconds of each part, those since the last lap as `first_step`."""
        self.told = True
        self.lap("first_step")
        shown = {part: round(seconds, 1) for part, seconds in self._parts.items()}
        log.info(f"The first step is done, {self._last - self._began:.1f} s after the process began", **shown)


def process_began() -> float:
    """Return when this process began, as a time of time.monotonic(); now where the system does not tell."""
    now = time.monotonic()
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        began, up = int(after_name[19]) / _TICKS_PER_SECOND, float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return now
    return now - max(0.0, up - began)
