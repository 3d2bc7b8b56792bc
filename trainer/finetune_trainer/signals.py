"""SIGTERM and Ctrl-C as a flag that the training loop reads at step boundaries."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import structlog

log = structlog.get_logger(__name__)


class StopFlag:
    """Set once the process is asked to stop; `reason` says by what."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.reason = ""

    def __bool__(self) -> bool:
        return self._event.is_set()

    def set(self, reason: str) -> None:
        if not self._event.is_set():
            self.reason = reason
            self._event.set()


@contextmanager
def stop_on_signals(flag: StopFlag) -> Iterator[None]:
    """Set `flag` on SIGTERM or the first Ctrl-C while the block runs; a second Ctrl-C raises KeyboardInterrupt."""

    def handle(number: int, frame: FrameType | None) -> None:
        if flag and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.set(signal.Signals(number).name)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
