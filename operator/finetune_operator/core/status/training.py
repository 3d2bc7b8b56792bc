"""The Training condition of a running attempt, and when it counts as stalled."""

from datetime import datetime, timedelta

from finetune_api.status import Attempt, TrainerReport
from finetune_operator.core.attempts.progress import TERMINAL_STAGES
from finetune_operator.core.status.conditions import ConditionValue

STALLED = "Stalled"


def stall_deadline(attempt: Attempt, running_since: datetime | None, limit_seconds: int) -> datetime | None:
    """Return when a trainer without new reports counts as stalled; a replaced pod starts the time again."""
    since = max((moment for moment in (attempt.heard_at, running_since) if moment), default=None)
    return since + timedelta(seconds=limit_seconds) if since else None


def training(report: TrainerReport | None, stalled_at: datetime | None, now: datetime) -> ConditionValue:
    """Return the Training condition of a running attempt."""
    if stalled_at and now >= stalled_at:
        doing = f"while {report.stage}" if report else "since its pod started"
        since = stalled_at.isoformat(timespec="seconds")
        return ConditionValue(
            "False", STALLED, f"the trainer has reported nothing new {doing}; limit passed at {since}"
        )
    if report is None:
        return ConditionValue("False", "Starting", "the trainer has not reported yet")
    if report.stage in TERMINAL_STAGES:
        return finishing()
    return ConditionValue("True" if report.stage == "Training" else "False", report.stage)


def finishing() -> ConditionValue:
    """Return the Training condition of an attempt whose trainer sent its final report."""
    return ConditionValue("False", "Finishing", "the trainer is done; its pod is about to end")
