"""The trainer's report -> status.progress, and whether training has stalled."""

from datetime import datetime, timedelta

from finetune_api.status import Attempt, Progress, TrainerReport
from finetune_operator.core.status.conditions import Said

STALLED = "Stalled"
_OVER = ("Succeeded", "Failed")


def merge(old: Progress | None, report: TrainerReport | None, now: datetime) -> Progress | None:
    """The progress to show. It never goes back, and changes only when the trainer says something new."""
    if report is None or report.progress == Progress():
        return old
    new = _complete(report.progress, now)
    if old is None:
        return new
    if new.step < old.step:  # a resumed attempt catches up first; only its pace is news
        return old.model_copy(update={field: getattr(new, field) for field in _PACE})
    return old if _content(new) == _content(old) else new


def _complete(progress: Progress, now: datetime) -> Progress:
    """Fill in what follows from the rest. Steps are optimizer steps."""
    step, total, eta = progress.step, progress.total_steps, progress.estimated_completion_time
    return progress.model_copy(
        update={
            "summary": progress.summary or (f"{step}/{total}" if total else str(step)),
            "percent": progress.percent if progress.percent is not None else (_percent(step, total) if total else None),
            "updated_at": (progress.updated_at or now).replace(microsecond=0),
            "estimated_completion_time": eta.replace(microsecond=0) if eta and eta > now else None,
        }
    )


def _percent(step: int, total: int) -> float:
    return round(min(100.0, 100 * step / total), 1)


#: What is true only while pods run.
_PACE = ("estimated_completion_time", "tokens_per_second")


def _content(progress: Progress) -> Progress:
    return progress.model_copy(update=dict.fromkeys((*_PACE, "updated_at")))


def at_rest(progress: Progress | None) -> Progress | None:
    """The progress of a job of which nothing runs: no pace, and no end in sight."""
    return progress.model_copy(update=dict.fromkeys(_PACE)) if progress else None


def finished(progress: Progress | None) -> Progress | None:
    """The progress of a job that is over: nothing is expected any more."""
    return progress.model_copy(update={"estimated_completion_time": None}) if progress else None


def heard(attempt: Attempt, report: TrainerReport, now: datetime) -> Attempt:
    """The attempt with what its trainer says of it. Another step or stage is news, also below the job's best step."""
    stage = attempt.stage if report.stage in _OVER else report.stage
    step = attempt.last_step if report.progress == Progress() else report.progress.step
    plan = report.execution_plan
    micro = plan.micro_batch_size if plan and plan.micro_batch_size else attempt.micro_batch_size
    is_news = (stage, step) != (attempt.stage, attempt.last_step)
    heard_at = now if is_news or attempt.heard_at is None else attempt.heard_at
    return attempt.model_copy(
        update={"stage": stage, "last_step": step, "micro_batch_size": micro, "heard_at": heard_at}
    )


def stall_deadline(attempt: Attempt, running_since: datetime | None, limit_seconds: int) -> datetime | None:
    """When a trainer that says nothing new counts as stalled. Its pod may have been replaced since it last did."""
    since = max((moment for moment in (attempt.heard_at, running_since) if moment), default=None)
    return since + timedelta(seconds=limit_seconds) if since else None


def training(report: TrainerReport | None, stalled_at: datetime | None, now: datetime) -> Said:
    """The Training condition of a running attempt."""
    if stalled_at and now >= stalled_at:
        doing = f"while {report.stage}" if report else "since its pod started"
        since = stalled_at.isoformat(timespec="seconds")
        return Said("False", STALLED, f"the trainer has reported nothing new {doing}; limit passed at {since}")
    if report is None:
        return Said("False", "Starting", "the trainer has not reported yet")
    if report.stage in _OVER:
        return finishing()
    return Said("True" if report.stage == "Training" else "False", report.stage)


def finishing() -> Said:
    """The trainer has said its last word."""
    return Said("False", "Finishing", "the trainer is done; its pod is about to end")
