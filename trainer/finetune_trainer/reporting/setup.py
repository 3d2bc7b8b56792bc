"""What a run shows while it lasts: HTTP endpoints and the progress bar."""

from contextlib import ExitStack

import structlog
from rich.console import Console

from finetune_trainer.reporting.http import Page, serve
from finetune_trainer.reporting.progress_bar import live_progress
from finetune_trainer.reporting.prometheus import Telemetry
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.settings import Settings

log = structlog.get_logger(__name__)


def show(
    exit_stack: ExitStack,
    settings: Settings,
    reporter: Reporter,
    console: Console | None,
    pages: dict[str, Page] | None = None,
) -> Telemetry:
    """Serve /metrics and /progress, and draw the live bar, until `exit_stack` closes.

    Args:
        exit_stack: Ends it.
        settings: Say where to listen.
        reporter: What is shown.
        console: The terminal, if there is one.
        pages: Further pages to serve, by path; more may be added while it serves.
    """
    telemetry = Telemetry()
    if not settings.ranks.is_main:
        return telemetry
    reporter.listen(telemetry.update)
    pages = {} if pages is None else pages
    pages |= {**pages_of(reporter, telemetry), "/healthz": ("text/plain", lambda: b"ok")}
    address = exit_stack.enter_context(serve(settings.environment.listen, pages))
    if address:
        log.info(f"Serving /metrics and /progress at {address}", address=address)
    if console:
        exit_stack.enter_context(live_progress(console, reporter))
    return telemetry


def pages_of(reporter: Reporter, telemetry: Telemetry) -> dict[str, Page]:
    """Return the pages of one run, by path."""
    return {
        "/metrics": ("text/plain; version=0.0.4; charset=utf-8", telemetry.text),
        "/progress": (
            "application/json",
            lambda: reporter.report.model_dump_json(by_alias=True, exclude_none=True).encode(),
        ),
    }
