"""Transitions of the status -> the events a user sees in `kubectl describe`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from finetune_api.status import Attempt, Condition, FineTuneJobStatus
from finetune_operator.core.failure import SUCCEEDED, UNCOUNTED


@dataclass(frozen=True)
class Event:
    """One event on the FineTuneJob. `about` makes its name, so that it is posted once however often it is planned."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str
    about: str


def between(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Event]:
    """What happened from `old` to `new`."""
    yield from _attempts(old, new)
    count = len(new.attempts)
    before = {condition.type: condition for condition in old.conditions}
    for condition in new.conditions:
        known = before.get(condition.type)
        same = known and (known.status, known.reason) == (condition.status, condition.reason)
        event = None if same else _event(condition, count)
        if event:
            yield event


def _attempts(old: FineTuneJobStatus, new: FineTuneJobStatus) -> Iterator[Event]:
    known = {attempt.job_name: attempt for attempt in old.attempts}
    for attempt in new.attempts:
        before = known.get(attempt.job_name)
        if before is None:
            yield Event("Normal", "AttemptStarted", _began(attempt), f"{attempt.job_name}/started")
        if attempt.reason not in (None, SUCCEEDED) and (before is None or before.reason is None):
            kind: Literal["Normal", "Warning"] = "Normal" if attempt.reason in UNCOUNTED else "Warning"
            message = f"{attempt.job_name}: {attempt.reason}: {attempt.message or ''}"
            yield Event(kind, "AttemptEnded", message, f"{attempt.job_name}/ended")


def _began(attempt: Attempt) -> str:
    micro = f" with micro-batch {attempt.micro_batch_size}" if attempt.micro_batch_size else ""
    return f"Job {attempt.job_name} created{micro}"


def _event(condition: Condition, attempts: int) -> Event | None:
    """The event for a condition that has changed; None where another condition or an attempt tells it."""
    about = f"{condition.type}/{condition.status}/{condition.reason}/{attempts}"
    match condition.type, condition.status:
        case "Succeeded", "True":
            return Event("Normal", "Succeeded", condition.message, about)
        case "Succeeded", "False":
            return Event("Warning", condition.reason, condition.message, about)
        case "Suspended", "True":
            return Event("Normal", condition.reason, condition.message, about)
        case "Scheduled", "False" if condition.reason not in ("Pending", "Finished", "Suspended", "BackingOff"):
            kind: Literal["Normal", "Warning"] = "Normal" if condition.reason in ("Queued", "Stopping") else "Warning"
            return Event(kind, condition.reason, condition.message, about)
        case "Training", "False" if condition.reason == "Stalled":
            return Event("Warning", "Stalled", condition.message, about)
    return None
