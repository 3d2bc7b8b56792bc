"""What each situation says in the six conditions and in the phase."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import get_args

from finetune_api.status import Condition, ConditionStatus, ConditionType, FineTuneJobStatus

MAX_MESSAGE = 4096
MAX_REASON = 128


@dataclass(frozen=True)
class Said:
    """One condition without its times."""

    status: ConditionStatus
    reason: str
    message: str = ""


_NOT_SUSPENDED = Said("False", "NotSuspended")
_NOT_PUBLISHED = Said("False", "NotYet", "the adapter is published at the end")
_ACCEPTED = Said("True", "Valid")


@dataclass(frozen=True)
class Scene:
    """A situation of the job: its phase and all six conditions."""

    phase: str
    scheduled: Said
    training: Said
    succeeded: Said
    accepted: Said = _ACCEPTED
    suspended: Said = _NOT_SUSPENDED
    published: Said = _NOT_PUBLISHED


def waiting(reason: str, message: str) -> Scene:
    """Nothing runs yet, or nothing runs just now."""
    phase = "Queued" if reason == "Queued" else "Pending"
    return Scene(phase, Said("False", reason, message), Said("False", "NotRunning"), Said("Unknown", reason, message))


def running(phase: str, training: Said) -> Scene:
    """The pods run; `training` says what the trainer does."""
    return Scene(phase, Said("True", "PodsRunning"), training, Said("Unknown", training.reason, training.message))


def recorded(status: FineTuneJobStatus) -> Scene:
    """What the status says already, while nothing better is known."""
    said = {each.type: Said(each.status, each.reason, each.message) for each in status.conditions}
    known = running(status.phase or "Starting", Said("False", "Starting"))
    return replace(
        known,
        scheduled=said.get("Scheduled", known.scheduled),
        training=said.get("Training", known.training),
        succeeded=said.get("Succeeded", known.succeeded),
        suspended=said.get("Suspended", known.suspended),
    )


def suspended(reason: str, message: str) -> Scene:
    scene = waiting("Suspended", message)
    return replace(scene, phase="Suspended", suspended=Said("True", reason, message))


def failed(reason: str, message: str) -> Scene:
    over = Said("False", "Finished")
    return Scene("Failed", over, over, Said("False", reason, message), published=Said("False", reason))


def refused(reason: str, message: str) -> Scene:
    return replace(failed(reason, message), accepted=Said("False", reason, message))


def succeeded(where: str, message: str) -> Scene:
    over = Said("False", "Finished")
    published = Said("True", "Verified", f"the adapter lies at {where}")
    return Scene("Succeeded", over, over, Said("True", "Succeeded", message), published=published)


def _word(reason: str) -> str:
    """The reason in the form that Kubernetes asks of one; kubelets and runtimes make up their own."""
    word = re.sub(r"[^A-Za-z0-9_,:]", "", reason)[:MAX_REASON].strip("_,:")
    return word if word[:1].isalpha() else f"Reason{word}"


def write(scene: Scene, old: Sequence[Condition], generation: int, now: datetime) -> list[Condition]:
    """The conditions of `scene`. lastTransitionTime moves only when a status flips."""
    before = {condition.type: condition for condition in old}
    written = []
    for kind in get_args(ConditionType):
        new: Said = getattr(scene, kind.lower())
        known = before.get(kind)
        since = known.last_transition_time if known and known.status == new.status else now
        written.append(
            Condition(
                type=kind,
                status=new.status,
                reason=_word(new.reason),
                message=new.message[:MAX_MESSAGE],
                last_transition_time=since,
                observed_generation=generation,
            )
        )
    return written
