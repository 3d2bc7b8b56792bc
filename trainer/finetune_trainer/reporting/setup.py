"""What surrounds a run in its process: imports, the pages it serves, its bar, its folder, and an end that is sure."""

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import structlog
from rich.console import Console

from finetune_api import constants
from finetune_trainer.errors import ConfigInvalid, Preempted, failure_of
from finetune_trainer.reporting.http import serve
from finetune_trainer.reporting.progress_bar import live_progress
from finetune_trainer.reporting.prometheus import Telemetry
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.settings import Settings

log = structlog.get_logger(__name__)


@contextmanager
def imported_for_good() -> Iterator[None]:
    """Import within it what stays to the end: the garbage collector, which would go through all of it again and again
    (half a million objects of torch and transformers), passes over it for ever."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def show(around: ExitStack, settings: Settings, reporter: Reporter, console: Console | None) -> Telemetry:
    """Serve /metrics and /progress, and draw the live bar, until `around` closes."""
    telemetry = Telemetry()
    if not settings.world.is_main:
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
    address = around.enter_context(serve(settings.place.listen, pages))
    if address:
        log.info("Serving /metrics and /progress", address=address)
    if console:
        around.enter_context(live_progress(console, reporter))
    return telemetry


@contextmanager
def work_folder(settings: Settings) -> Iterator[Path]:
    """An empty folder below the scratch space, removed afterwards. Raises ConfigInvalid when there is no such space."""
    scratch = settings.place.scratch
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{settings.job_name}-", dir=scratch))
    except OSError as error:
        raise ConfigInvalid(f"{constants.ENV_SCRATCH_DIR}: {scratch} cannot be written: {error.strerror}") from None
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def leave_at_once(reporter: Reporter) -> NoReturn:
    """End the process although something in it still hangs: it was asked to stop, and all is saved."""
    failure = failure_of(Preempted("Asked to stop; what was saved is whole, what was under way is given up"))
    log.error(failure.message, reason=failure.reason, exit_code=failure.exit_code)
    reporter.failed(failure)
    os._exit(failure.exit_code)
