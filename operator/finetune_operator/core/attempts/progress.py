"""Merge the trainer's report into status.progress and into the current attempt."""

import math
from datetime import datetime

from finetune_api.status import Attempt, Progress, Resumption, TrainerReport

TERMINAL_STAGES = ("Succeeded", "Failed")


def merge(old: Progress | None, report: TrainerReport | None, now: datetime) -> Progress | None:
    """Return the progress to show. It never goes back, and changes only when the trainer reports something new."""
    if report is None or report.progress == Progress():
        return old
    new = _complete(report.progress, now)
    if old is None:
        return new
    if new.step < old.step:  # a resumed attempt catches up first; show only its pace
        return old.model_copy(update={field: getattr(new, field) for field in _PACE_FIELDS})
    return old if _content(new) == _content(old) else new


def _complete(progress: Progress, now: datetime) -> Progress:
    """Fill in the derived fields. Steps are optimizer steps."""
    step, total, eta = progress.step, progress.total_steps, progress.estimated_completion_time
    rounded = {name: _rounded(value) for name, value in progress if isinstance(value, float)}
    return progress.model_copy(
        update=rounded
        | {
            "summary": progress.summary or (f"{step}/{total}" if total else str(step)),
            "percent": percent(progress),
            "updated_at": (progress.updated_at or now).replace(microsecond=0),
            "estimated_completion_time": eta.replace(microsecond=0) if eta and eta > now else None,
        }
    )


def _rounded(value: float) -> float:
    """Return `value` with the digits that matter: kubectl's columns show all there are."""
    rounded = float(f"{value:.5g}")
    return rounded if math.isfinite(rounded) else value


def percent(progress: Progress) -> float | None:
    """Return how much of the training is done, as the trainer says or as its steps tell."""
    if progress.percent is not None or not progress.total_steps:
        return progress.percent
    return round(min(100.0, 100 * progress.step / progress.total_steps), 1)


#: Fields that hold only while pods run.
_PACE_FIELDS = ("estimated_completion_time", "tokens_per_second")


def _content(progress: Progress) -> Progress:
    return progress.model_copy(update=dict.fromkeys((*_PACE_FIELDS, "updated_at")))


def paused(progress: Progress | None) -> Progress | None:
    """Return the progress of a job without running pods: no pace and no estimated end."""
    return progress.model_copy(update=dict.fromkeys(_PACE_FIELDS)) if progress else None


def resumption(found: Resumption | None) -> str:
    """Return where training went on, as a phrase; empty where it began at step 0."""
    if found is None:
        return ""
    whose = f" of an earlier FineTuneJob (uid {found.job_uid})" if found.job_uid else ""
    return f"resumed from step {found.step}{whose}"


def finished(progress: Progress | None, succeeded: bool) -> Progress | None:
    """Return the progress of a finished job: no estimated end; 100 % if it succeeded, also when it stopped early."""
    if progress is None:
        return None
    done = 100.0 if succeeded else progress.percent
    return progress.model_copy(update={"estimated_completion_time": None, "percent": done})


def record_report(attempt: Attempt, report: TrainerReport, now: datetime) -> Attempt:
    """Return the attempt, updated from a report. A new step or stage counts as progress, also below the best step."""
    stage = attempt.stage if report.stage in TERMINAL_STAGES else report.stage
    step = attempt.last_step if report.progress == Progress() else report.progress.step
    plan = report.execution_plan
    micro = plan.micro_batch_size if plan and plan.micro_batch_size else attempt.micro_batch_size
    is_news = (stage, step) != (attempt.stage, attempt.last_step)
    heard_at = now if is_news or attempt.heard_at is None else attempt.heard_at
    return attempt.model_copy(
        update={
            "stage": stage,
            "last_step": step,
            "micro_batch_size": micro,
            "heard_at": heard_at,
            "resumed_from": report.resumed_from or attempt.resumed_from,
            # With other news, so that it costs no write of its own.
            "gpu": attempt.gpu or (report.gpu if is_news else None),
        }
    )
