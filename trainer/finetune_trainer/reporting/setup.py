"""What a run shows while it lasts: HTTP endpoints and the progress bar."""

from contextlib import ExitStack

import structlog
from rich.console import Console

from finetune_trainer.reporting.http import serve
from finetune_trainer.reporting.progress_bar import live_progress
from finetune_trainer.reporting.prometheus import Telemetry
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.settings import Settings

log = structlog.get_logger(__name__)


def show(exit_stack: ExitStack, settings: Settings, reporter: Reporter, console: Console | None) -> Telemetry:
    """Serve /metrics and /progress, and draw the live bar, until `exit_stack` closes."""
    telemetry = Telemetry()
    if not settings.ranks.is_main:
        return telemetry
    reporter.listen(telemetry.update)
    pages = {
        "/metrics": ("text/plain; version=0.0.4; charset=utf-8", telemetry.text),
        "/progress": (
            "application/json",
            lambda: reporter.report.model_dump_json(by_alias=True, exclude_none=True).encode(),
        ),
        "/healthz": ("text/plain", lambda: b"ok"),
    }
    address = exit_stack.enter_context(serve(settings.environment.listen, pages))
    if address:
        log.info(f"Serving /metrics and /progress at {address}", address=address)
    if console:
        exit_stack.enter_context(live_progress(console, reporter))
    return telemetry
