"""Graceful shutdown: set a flag while a checkpoint can be saved, else exit."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

#: Seconds from the signal, or from the end of the save, until the process exits, whatever still hangs.
TIMEOUT: Final = 10.0
#: One press of Ctrl-C may arrive twice: from the terminal or a supervisor, which tell all processes, and passed on.
SAME_PRESS_SECONDS: Final = 0.5


class StopFlag:
    """Set once the process is asked to stop; `reason` says by what."""

    def __init__(self, force_exit: Callable[[], None] = lambda: None) -> None:
        """`force_exit` ends the process. It is called from another thread if the process has not exited in TIMEOUT."""
        self._force_exit = force_exit
        self._timer: threading.Timer | None = None
        self.reason = ""  # also the flag: an Event has a lock, for which a second signal's handler would wait forever
        self._saving = 0  # blocks that save: trials of one process each have theirs

    def __bool__(self) -> bool:
        return bool(self.reason)

    @property
    def is_saving(self) -> bool:
        return self._saving > 0

    def set(self, reason: str) -> None:
        """Ask the process to stop; only the first `reason` is kept."""
        if not self:
            self.reason = reason
        if not self.is_saving:
            self._start_timer()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Let the block save a checkpoint once asked to stop, however long that takes."""
        self._saving += 1
        try:
            yield
        finally:
            self._saving -= 1
            if self and not self.is_saving:
                self._start_timer()

    def disarm(self) -> None:
        """Stop the timer: the process exits by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(TIMEOUT, self._force_exit)
            self._timer.daemon = True
            self._timer.start()


@contextmanager
def stop_on_signals(flag: StopFlag, alone: bool = True) -> Iterator[None]:
    """Set `flag` on SIGTERM or Ctrl-C while the block runs.

    Outside of flag.saving() the signal also raises KeyboardInterrupt, for there is nothing to save; so does a second
    Ctrl-C. A process that is not `alone` exits together with the other ranks, where they look at the flag.
    """
    pressed = -math.inf

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if number == signal.SIGINT:
            before, pressed = pressed, time.monotonic()
            if pressed - before < SAME_PRESS_SECONDS:
                return
        again = bool(flag)
        flag.set(signal.Signals(number).name)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt("Stopped by a second Ctrl-C; the last saved checkpoint is intact")
        if alone and not flag.is_saving:
            raise KeyboardInterrupt(f"Stopped by {flag.reason} with nothing to save; nothing is lost")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        flag.disarm()
