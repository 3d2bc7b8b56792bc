"""The Training condition of a running attempt, and when it counts as stalled."""

from collections.abc import Sequence
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
    report: TrainerReport | None,
    stalled_at: datetime | None,
    silent_since: datetime | None,
    now: datetime,
    resumed: str = "",
) -> ConditionValue:
    """Return the Training condition of a running attempt.

    Args:
        report: The latest of its trainer.
        stalled_at: When it counts as stalled.
        silent_since: When a trainer that was heard went silent.
        now: The time.
        resumed: Where training went on, as a phrase.
    """
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
    return ConditionValue("True" if report.stage == "Training" else "False", report.stage, resumed)


def finishing(
    beside: Sequence[str] = (), stalled_at: datetime | None = None, now: datetime | None = None
) -> ConditionValue:
    """Return the Training condition of an attempt whose first trainer is done.

    Args:
        beside: Other containers of its pods that still run.
        stalled_at: When that has lasted too long, for a trainer of another pod still runs.
        now: The time.
    """
    waits = f"waiting for container {', '.join(dict.fromkeys(beside))}" if beside else "its pod is about to end"
    if stalled_at and now and now >= stalled_at:
        since = stalled_at.isoformat(timespec="seconds")
        return ConditionValue(
            "False",
            STALLED,
            f"the first trainer is done, but its attempt has not ended: {waits}; limit passed at {since}",
        )
    return ConditionValue("False", "Finishing", f"the trainer is done; {waits}")
