"""Logging: text on a terminal, JSON lines elsewhere, or as asked for; and a copy in the adapter's training/log.txt."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import structlog
from rich.console import Console

from finetune_api import log_lines
from finetune_trainer.redact import redacted

Form = Literal["text", "json"]
#: The copy of the log in the run's scratch directory, and in the adapter's training/.
LOG_FILE: Final = "log.txt"
_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.stdlib.ExtraAdder(),
]
_NOISY = ("httpx", "httpcore", "urllib3", "botocore", "boto3", "s3transfer", "filelock", "fsspec", "matplotlib", "PIL")


class _ConsoleStream:
    """A text stream that prints above a live progress bar."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def write(self, text: str) -> None:
        if text.strip():
            self._console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)

    def flush(self) -> None:
        pass


def configure(console: Console | None = None, form: Form | None = None, *, details: bool = False) -> None:
    """Send all logging, of libraries too, to stderr, above the bar of `console` if given.

    Without a `form` that is text above a bar and JSON lines elsewhere; text has every detail with `details`.
    """
    stream = logging.StreamHandler(_ConsoleStream(console) if console else sys.stderr)
    is_text = form == "text" or (form is None and console is not None)
    stream.setFormatter(_formatter(_Readable(details) if is_text else structlog.processors.JSONRenderer()))
    root = logging.getLogger()
    root.handlers = [stream]
    root.setLevel(logging.INFO)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advice on optional CPU kernels
    logging.captureWarnings(True)
    threading.excepthook = _log_thread_error
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *_SHARED,
            structlog.processors.StackInfoRenderer(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )


def copy_to(path: Path) -> None:
    """Also append all log lines, readable, to the file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_formatter(_Readable(details=True)))
    logging.getLogger().addHandler(handler)


class _Readable:
    """Renders an event as one line for people."""

    def __init__(self, details: bool) -> None:
        self._details = details

    def __call__(self, _logger: Any, _method: str, event: dict[str, Any]) -> str:
        return log_lines.readable(event, details=self._details)


@contextmanager
def copied_to(path: Path, of: threading.Thread) -> Iterator[None]:
    """Also append the log lines of one thread to the file at `path` while the block runs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_formatter(_Readable(details=True)))
    handler.addFilter(lambda record: record.thread == of.ident)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _without_secrets(_logger: Any, _method: str, line: Any) -> str:
    """Remove what libraries quote in messages and tracebacks: headers, keys, users and passwords of URLs."""
    return redacted(line)


def _log_thread_error(args: "threading.ExceptHookArgs") -> None:
    """Log what ends a thread: Python's own report would go to stderr as it is."""
    if args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "?"
        cause = args.exc_value or args.exc_type()
        logging.getLogger(__name__).error(f"A thread ({name}) failed", exc_info=cause)


def _formatter(renderer: Any) -> logging.Formatter:
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            renderer,
            _without_secrets,
        ],
    )
