"""The trainer's report -> status.progress, and whether training has stalled."""

from datetime import datetime, timedelta

from finetune_api.status import Progress, TrainerReport
from finetune_operator.core.conditions import Said

STALLED = "Stalled"


def merge(old: Progress | None, report: TrainerReport | None, now: datetime) -> Progress | None:
    """The progress to show. It never goes back, and changes only when the trainer says something new."""
    if report is None or report.progress == Progress():
        return old
    new = _complete(report.progress, now)
    if old is None:
        return new
    if new.step < old.step or _content(new) == _content(old):
        return old  # a resumed attempt catches up first
    return new


def _complete(progress: Progress, now: datetime) -> Progress:
    """Fill in what follows from the rest. Steps are optimizer steps."""
    step, total = progress.step, progress.total_steps
    return progress.model_copy(
        update={
            "summary": progress.summary or (f"{step}/{total}" if total else str(step)),
            "percent": progress.percent if progress.percent is not None else (_percent(step, total) if total else None),
            "updated_at": (progress.updated_at or now).replace(microsecond=0),
        }
    )


def _percent(step: int, total: int) -> float:
    return round(min(100.0, 100 * step / total), 1)


def _content(progress: Progress) -> Progress:
    return progress.model_copy(update={"updated_at": None, "estimated_completion_time": None})


def finished(progress: Progress | None) -> Progress | None:
    """The progress of a job that is over: nothing is expected any more."""
    return progress.model_copy(update={"estimated_completion_time": None}) if progress else None


def stall_deadline(progress: Progress | None, started: datetime | None, limit_seconds: int) -> datetime | None:
    """When a trainer that says nothing new counts as stalled."""
    last = progress.updated_at if progress and progress.updated_at else None
    since = max((moment for moment in (last, started) if moment), default=None)
    return since + timedelta(seconds=limit_seconds) if since else None


def training(report: TrainerReport | None, stalled_at: datetime | None, now: datetime) -> Said:
    """The Training condition of a running attempt."""
    if stalled_at and now >= stalled_at:
        doing = f"while {report.stage}" if report else "since its pod started"
        since = stalled_at.isoformat(timespec="seconds")
        return Said("False", STALLED, f"the trainer has reported nothing new {doing}; limit passed at {since}")
    if report is None:
        return Said("False", "Starting", "the trainer has not reported yet")
    if report.stage in ("Succeeded", "Failed"):
        return Said("False", "Finishing", "the trainer is done; its pod is about to end")
    return Said("True" if report.stage == "Training" else "False", report.stage)
