"""SIGTERM and Ctrl-C: a flag where there is something to save first, an end at once where there is not."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

#: Seconds from being asked to stop, or from the end of the save, until the process leaves, whatever still hangs.
TIMEOUT: Final = 10.0


class StopFlag:
    """Set once the process is asked to stop; `reason` says by what."""

    def __init__(self, give_up: Callable[[], None] = lambda: None) -> None:
        """`give_up` ends the process; called, from another thread, when it has not ended by itself in PATIENCE."""
        self._event = threading.Event()
        self._give_up = give_up
        self._timer: threading.Timer | None = None
        self.reason = ""
        self.is_saving = False

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        if not self._event.is_set():
            self.reason = reason
            self._event.set()
        if not self.is_saving:
            self._leave_soon()

    @contextmanager
    def saving(self) -> Iterator[None]:
        """For a block that, once asked to stop, saves what there is to save, however long it takes, and ends."""
        self.is_saving = True
        try:
            yield
        finally:
            self.is_saving = False
            if self:
                self._leave_soon()

    def disarm(self) -> None:
        """The process ends by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _leave_soon(self) -> None:
        if self._timer is None:
            self._timer = threading.Timer(TIMEOUT, self._give_up)
            self._timer.daemon = True
            self._timer.start()


@contextmanager
def stop_on_signals(flag: StopFlag, alone: bool = True) -> Iterator[None]:
    """Set `flag` on SIGTERM or Ctrl-C while the block runs.

    Outside of flag.saving() it also raises KeyboardInterrupt, for there is nothing to save; so does a second Ctrl-C.
    A process that is not `alone` first tries to leave together with the others, where they look at the flag.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        again = bool(flag)
        flag.set(signal.Signals(number).name)
        if (alone and not flag.is_saving) or (again and number == signal.SIGINT):
            raise KeyboardInterrupt(f"Asked to stop ({flag.reason}) where there was nothing to save: nothing is lost")

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        flag.disarm()
