"""The Training condition of a running attempt, and when it counts as stalled."""

from datetime import datetime, timedelta

from finetune_api.status import Attempt, TrainerReport
from finetune_operator.core.attempts.progress import TERMINAL_STAGES
from finetune_operator.core.status.conditions import ConditionValue

STALLED = "Stalled"
NOT_ANSWERING = "NotAnswering"


def stall_deadline(attempt: Attempt, running_since: datetime | None, limit_seconds: int) -> datetime | None:
    """Return when a trainer without new reports counts as stalled; a replaced pod starts the time again."""
    since = max((moment for moment in (attempt.heard_at, running_since) if moment), default=None)
    return since + timedelta(seconds=limit_seconds) if since else None


def was_heard(attempt: Attempt, running_since: datetime | None) -> bool:
    """Return whether the trainer of the running pods has reported, to this operator or to an earlier one."""
    return attempt.heard_at is not None and (running_since is None or attempt.heard_at >= running_since)


def training(
    report: TrainerReport | None, stalled_at: datetime | None, silent_since: datetime | None, now: datetime
) -> ConditionValue:
    """Return the Training condition of a running attempt; `silent_since`: when a trainer that was heard went silent."""
    if stalled_at and now >= stalled_at:
        doing = f"while {report.stage}" if report else "since its pod started"
        since = stalled_at.isoformat(timespec="seconds")
        return ConditionValue(
            "False", STALLED, f"the trainer has reported nothing new {doing}; limit passed at {since}"
        )
    if silent_since:
        since = silent_since.isoformat(timespec="seconds").replace("+00:00", "Z")
        return ConditionValue(
            "Unknown",
            NOT_ANSWERING,
            f"the trainer has not answered since {since}; its node may be down, or out of the operator's reach",
        )
    if report is None:
        return ConditionValue("False", "Starting", "the trainer has not reported yet")
    if report.stage in TERMINAL_STAGES:
        return finishing()
    return ConditionValue("True" if report.stage == "Training" else "False", report.stage)


def finishing() -> ConditionValue:
    """Return the Training condition of an attempt whose trainer sent its final report."""
    return ConditionValue("False", "Finishing", "the trainer is done; its pod is about to end")
