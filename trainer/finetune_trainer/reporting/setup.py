"""What surrounds a run in its process: imports, the pages it serves, its bar, its folder, and an end that is sure."""

from contextlib import ExitStack

import structlog
from rich.console import Console

from finetune_trainer.reporting.http import serve
from finetune_trainer.reporting.progress_bar import live_progress
from finetune_trainer.reporting.prometheus import Telemetry
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.settings import Settings

log = structlog.get_logger(__name__)


def show(around: ExitStack, settings: Settings, reporter: Reporter, console: Console | None) -> Telemetry:
    """Serve /metrics and /progress, and draw the live bar, until `around` closes."""
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
    address = around.enter_context(serve(settings.environment.listen, pages))
    if address:
        log.info("Serving /metrics and /progress", address=address)
    if console:
        around.enter_context(live_progress(console, reporter))
    return telemetry
