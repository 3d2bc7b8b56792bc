"""The trainer's report -> status.progress, and whether training has stalled."""

from datetime import datetime, timedelta

from finetune_api.status import Attempt, TrainerReport
from finetune_operator.core.attempts.progress import TERMINAL_STAGES
from finetune_operator.core.status.conditions import ConditionValue

STALLED = "Stalled"


def stall_deadline(attempt: Attempt, running_since: datetime | None, limit_seconds: int) -> datetime | None:
    """When a trainer that says nothing new counts as stalled. Its pod may have been replaced since it last did."""
    since = max((moment for moment in (attempt.heard_at, running_since) if moment), default=None)
    return since + timedelta(seconds=limit_seconds) if since else None


def training(report: TrainerReport | None, stalled_at: datetime | None, now: datetime) -> ConditionValue:
    """The Training condition of a running attempt."""
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
    """The trainer has said its last word."""
    return ConditionValue("False", "Finishing", "the trainer is done; its pod is about to end")
