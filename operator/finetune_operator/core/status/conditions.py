"""The conditions and the phase of each situation of a job."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import get_args

from finetune_api import constants, exit_codes
from finetune_api.status import Condition, ConditionStatus, ConditionType, FineTuneJobStatus

MAX_MESSAGE = 4096
MAX_REASON = 128


@dataclass(frozen=True)
class ConditionValue:
    """One condition without its times."""

    status: ConditionStatus
    reason: str
    message: str = ""


_NOT_SUSPENDED = ConditionValue("False", "NotSuspended")
_NOT_PUBLISHED = ConditionValue("False", "NotYet", "the adapter is published at the end")
_ACCEPTED = ConditionValue("True", "Valid")


@dataclass(frozen=True)
class JobConditions:
    """The phase and all conditions of a job."""

    phase: str
    scheduled: ConditionValue
    training: ConditionValue
    succeeded: ConditionValue
    accepted: ConditionValue = _ACCEPTED
    suspended: ConditionValue = _NOT_SUSPENDED
    published: ConditionValue = _NOT_PUBLISHED

    @property
    def finished(self) -> ConditionValue:
        """Finished: True either way, so that one `kubectl wait` returns for a job that fails, too."""
        match self.succeeded.status:
            case "True":
                return ConditionValue("True", "Succeeded")
            case "False":
                return ConditionValue("True", "Failed")
        return ConditionValue("False", "NotFinished")


def waiting(reason: str, message: str) -> JobConditions:
    """Return the conditions of a job without running pods."""
    phase = "Queued" if reason == "Queued" else "Pending"
    return JobConditions(
        phase,
        ConditionValue("False", reason, message),
        ConditionValue("False", "NotRunning"),
        ConditionValue("Unknown", reason, message),
    )


def running(phase: str, training: ConditionValue) -> JobConditions:
    """Return the conditions of a job whose pods run; `training` tells what the trainer does."""
    return JobConditions(
        phase,
        pods_running(),
        training,
        ConditionValue("Unknown", training.reason, training.message),
    )


def pods_running(unlabeled: Sequence[str] = (), remarks: Sequence[str] = ()) -> ConditionValue:
    """Return Scheduled of running pods, with what others did to them.

    `unlabeled` are Jobs and pods that somebody took our label from; `remarks` are more sentences.
    """
    said = [*remarks]
    if unlabeled:
        names, label = ", ".join(sorted(unlabeled)), constants.LABEL_JOB
        said.insert(0, f"the label {label} was removed from {names}: put it back; metrics and network rules need it")
    return ConditionValue("True", "PodsRunning", ". ".join(said))


def recorded(status: FineTuneJobStatus) -> JobConditions:
    """Return the recorded conditions, while nothing newer is known."""
    values = {each.type: ConditionValue(each.status, each.reason, each.message) for each in status.conditions}
    known = running(status.phase or "Starting", ConditionValue("False", "Starting"))
    return replace(
        known,
        scheduled=values.get("Scheduled", known.scheduled),
        training=values.get("Training", known.training),
        succeeded=values.get("Succeeded", known.succeeded),
        suspended=values.get("Suspended", known.suspended),
    )


def suspended(reason: str, message: str) -> JobConditions:
    return replace(waiting("Suspended", message), phase="Suspended", suspended=ConditionValue("True", reason, message))


def failed(reason: str, message: str) -> JobConditions:
    over = ConditionValue("False", "Finished")
    return JobConditions(
        "Failed", over, over, ConditionValue("False", reason, message), published=ConditionValue("False", reason)
    )


def rejected(reason: str, message: str) -> JobConditions:
    return replace(failed(reason, message), accepted=ConditionValue("False", reason, message))


def succeeded(uri: str, message: str) -> JobConditions:
    over = ConditionValue("False", "Finished")
    # The operator reads no store. It knows that the Job is complete and what its pod reported, no more.
    told = f"the trainer reports that it published the adapter at {uri}, read it back and loaded it"
    published = ConditionValue("True", "Reported", told)
    return JobConditions("Succeeded", over, over, ConditionValue("True", "Succeeded", message), published=published)


def kept_back(message: str) -> JobConditions:
    """Return the conditions of a job that did all of its work, whose adapter does not meet publish.onlyIf."""
    over = ConditionValue("False", "Finished")
    said = exit_codes.GATE_NOT_PASSED
    published = ConditionValue("False", said, message)
    return JobConditions("Succeeded", over, over, ConditionValue("True", said, message), published=published)


def _valid_reason(reason: str) -> str:
    """Return the reason in the form that Kubernetes requires; kubelets and runtimes use other forms."""
    word = re.sub(r"[^A-Za-z0-9_,:]", "", reason)[:MAX_REASON].strip("_,:")
    return word if word[:1].isalpha() else f"Reason{word}"


def write(conditions: JobConditions, old: Sequence[Condition], generation: int, now: datetime) -> list[Condition]:
    """Return the API conditions of a job."""
    values = {kind: getattr(conditions, kind.lower()) for kind in get_args(ConditionType)}
    return write_values(values, old, generation, now)


def write_values(
    values: Mapping[ConditionType, ConditionValue], old: Sequence[Condition], generation: int, now: datetime
) -> list[Condition]:
    """Return API conditions. lastTransitionTime changes only when a status flips."""
    before = {condition.type: condition for condition in old}
    written = []
    for kind, new in values.items():
        known = before.get(kind)
        since = known.last_transition_time if known and known.status == new.status else now
        written.append(
            Condition(
                type=kind,
                status=new.status,
                reason=_valid_reason(new.reason),
                message=new.message[:MAX_MESSAGE],
                last_transition_time=since,
                observed_generation=generation,
            )
        )
    return written
