"""Say that a server does not answer while one waits for it, not only when one has given up."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Timer
from typing import Final

import structlog

#: Seconds without an answer after which it is said.
SILENT_SECONDS: Final = 3
#: Where it is said; the command line has a screen of its own.
TELL: ContextVar[Callable[[str], object] | None] = ContextVar("tell", default=None)
_timer: ContextVar[Timer | None] = ContextVar("timer", default=None)
log = structlog.get_logger()


@contextmanager
def waiting_for(what: str, seconds: float) -> Iterator[None]:
    """Say that `what` is waited for, and at most how long, if no answer comes soon.

    Args:
        what: The server, for the message.
        seconds: How long it is tried before it fails.
    """
    message = f"Waiting for {what} to answer: it is tried for {seconds:.0f} seconds"
    timer = Timer(SILENT_SECONDS, TELL.get() or log.warning, [message])
    timer.daemon = True
    timer.start()
    token = _timer.set(timer)
    try:
        yield
    finally:
        _timer.reset(token)
        timer.cancel()


def answered() -> None:
    """Note that the server answers: what takes long from now on is its data."""
    if timer := _timer.get():
        timer.cancel()
