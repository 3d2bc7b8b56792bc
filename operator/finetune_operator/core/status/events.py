"""Turn status transitions into the events that `kubectl describe` shows."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from finetune_api.status import Attempt, Condition, FineTuneJobStatus
from finetune_operator.core.attempts import progress
from finetune_operator.core.attempts.failure import ENDED_WELL, GATE_NOT_PASSED, JOB_REFUSED, NOT_COUNTED_AS_FAILURE
from finetune_operator.core.objects import status_io
from finetune_operator.core.status.training import NOT_ANSWERING, STALLED

Kind = Literal["Normal", "Warning"]
LONG_WAIT = timedelta(seconds=60)
DISRUPTED = "PodDisrupted"
RESUMED = "ResumedFromCheckpoint"
#: Stages between training steps: the return from them posts no event.
_BESIDE_TRAINING = ("Evaluating", "Publishing", "Verifying")


@dataclass(frozen=True)
class Event:
    """One event on the FineTuneJob. Its name follows from `subject`, so that repeated plans post it once."""

    type: Kind
    reason: str
    message: str
    subject: str


def between(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Event]:
    """Yield the events of the transition from `old` to `new`."""
    yield from _attempts(old, new)
    before = {condition.type: condition for condition in old.conditions}
    for condition in new.conditions:
        known = before.get(condition.type)
        if known and (known.status, known.reason) == (condition.status, condition.reason):
            continue
        subject = f"{condition.type}/{condition.status}/{condition.reason}/{len(new.attempts)}"
        event = _warning_or_end(condition, subject)
        if event is None and not status_io.is_terminal(new):
            event = _progress(known, condition, subject)
        if event:
            yield event


def _attempts(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Event]:
    known = {attempt.job_name: attempt for attempt in old.attempts}
    for attempt in new.attempts:
        before = known.get(attempt.job_name)
        if before is None and attempt.reason != JOB_REFUSED:
            yield Event("Normal", "AttemptStarted", _started_message(attempt), f"{attempt.job_name}/started")
        yield from _within(before or Attempt(job_name=attempt.job_name), attempt)
        if attempt.reason not in (None, *ENDED_WELL) and (before is None or before.reason is None):
            kind: Kind = "Normal" if attempt.reason in NOT_COUNTED_AS_FAILURE - {JOB_REFUSED} else "Warning"
            message = f"{attempt.job_name}: {attempt.reason}: {attempt.message or ''}"
            yield Event(kind, "AttemptEnded", message, f"{attempt.job_name}/ended")


def _within(before: Attempt, attempt: Attempt) -> Iterator[Event]:
    """Yield the events of what happened to the pods of one attempt."""
    name = attempt.job_name
    if attempt.disruptions and attempt.disruptions != before.disruptions:
        yield Event("Warning", DISRUPTED, f"{name}: {attempt.disruption}", f"{name}/disrupted/{attempt.disruptions}")
    if attempt.resumed_from and attempt.resumed_from != before.resumed_from:
        kind: Kind = "Warning" if attempt.resumed_from.job_uid else "Normal"
        message = f"{name} {progress.resumption(attempt.resumed_from)}"
        yield Event(kind, RESUMED, message, f"{name}/resumed/{attempt.resumed_from.step}")


def _started_message(attempt: Attempt) -> str:
    micro = f" with micro-batch {attempt.micro_batch_size}" if attempt.micro_batch_size else ""
    return f"Job {attempt.job_name} created{micro}"


def _warning_or_end(condition: Condition, subject: str) -> Event | None:
    """Return the event for a changed condition; None where another condition or an attempt posts it."""
    match condition.type, condition.status:
        case "Succeeded", "True":
            kind: Kind = "Warning" if condition.reason == GATE_NOT_PASSED else "Normal"
            return Event(kind, condition.reason, condition.message, subject)
        case "Succeeded", "False":
            return Event("Warning", condition.reason, condition.message, subject)
        case "Suspended", "True":
            return Event("Normal", condition.reason, condition.message, subject)
        case "Scheduled", "False" if condition.reason not in ("Pending", "Finished", "Suspended", "BackingOff"):
            kind = "Normal" if condition.reason in ("Queued", "Stopping") else "Warning"
            return Event(kind, condition.reason, condition.message, subject)
        case "Training", _ if condition.reason in (STALLED, NOT_ANSWERING):
            return Event("Warning", condition.reason, condition.message, subject)
    return None


def _was_long_wait(known: Condition, condition: Condition) -> bool:
    """Return whether the end of a wait deserves an event; for pods that start at once, `Training` follows anyway."""
    waited = condition.last_transition_time - known.last_transition_time
    return known.reason != "Pending" or waited >= LONG_WAIT


def _progress(known: Condition | None, condition: Condition, subject: str) -> Event | None:
    """Return the event for a condition that has improved."""
    was, now = known.reason if known else "", condition.reason
    match condition.type, condition.status:
        case "Scheduled", "True" if known and _was_long_wait(known, condition):
            return Event("Normal", "PodsRunning", "all pods of the attempt are running", subject)
        case "Suspended", "False" if known and known.status == "True":
            return Event("Normal", "Resumed", "spec.suspend is false again", subject)
        case "Training", _ if was == STALLED and now != "NotRunning":
            return Event("Normal", "Recovered", f"training recovered from a stall: {now}", f"{subject}/recovered")
        case "Training", _ if was == NOT_ANSWERING and now != "NotRunning":
            return Event("Normal", "Recovered", f"the trainer answers again: {now}", f"{subject}/answers")
        case "Training", "True" if was not in _BESIDE_TRAINING:
            return Event("Normal", "Training", "training is running", subject)
    return None
