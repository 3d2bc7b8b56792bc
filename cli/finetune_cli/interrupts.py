"""Ctrl-C that is never lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. In an object's finalizer (a response that is
closed, say) the exception is dropped in silence, and a command that waits for the cluster would go on waiting.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

#: Seconds after which an interrupt that had no effect is raised again.
INSIST_SECONDS = 0.5


@contextmanager
def insistent_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt on SIGINT, and again until the block is left. For the main thread.

    Where SIGINT is ignored, as a shell arranges for commands in the background, it stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        signal.setitimer(signal.ITIMER_REAL, INSIST_SECONDS)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGALRM)}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
