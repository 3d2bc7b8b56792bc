"""activeDeadlineSeconds, pendingDeadlineSeconds and ttlSecondsAfterFinished."""

from collections.abc import Sequence
from datetime import datetime, timedelta

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt, FineTuneJobStatus
from finetune_operator.core.attempts import pod_set
from finetune_operator.core.objects import status_io
from finetune_operator.core.objects.observed import JobObject

ACTIVE = "DeadlineExceeded"
PENDING = "PendingDeadlineExceeded"


def active_left(
    spec: FineTuneJobSpec, history: Sequence[Attempt], running_since: datetime | None, now: datetime
) -> float | None:
    """Return the seconds that all attempts together may still run; None without a deadline."""
    if spec.active_deadline_seconds is None:
        return None
    return spec.active_deadline_seconds - pod_set.run_seconds(history, running_since, now)


def pending_left(spec: FineTuneJobSpec, since: datetime | None, now: datetime) -> float | None:
    """Return the seconds that the job may still wait for its pods; None without a deadline."""
    if spec.pending_deadline_seconds is None or since is None:
        return None
    return (since + timedelta(seconds=spec.pending_deadline_seconds) - now).total_seconds()


def pending_since(
    job: JobObject, status: FineTuneJobStatus, history: Sequence[Attempt], due: datetime | None
) -> datetime | None:
    """Return when the present wait began: with the attempt, or after the backoff (until `due`) or suspension."""
    last = history[-1] if history else None
    if last and last.reason is None:
        return last.started_at
    suspended = status_io.condition(status, "Suspended")
    marks = [job.created_at, due, suspended.last_transition_time if suspended else None]
    return max((mark for mark in marks if mark), default=None)


def ttl_left(ttl_seconds: int | None, status: FineTuneJobStatus, now: datetime) -> float | None:
    """Return the seconds until a finished FineTuneJob is deleted; None when it is kept."""
    if ttl_seconds is None or status.completion_time is None:
        return None
    return (status.completion_time + timedelta(seconds=ttl_seconds) - now).total_seconds()
