"""The types of planning: what is known of a job (View), its next step (Step), what to do (Plan)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt, EarlierAttempts, FineTuneJobStatus, Progress, TrainerReport
from finetune_operator.core.attempts.failure import Ending
from finetune_operator.core.objects.observed import Child, Observed
from finetune_operator.core.status.conditions import JobConditions
from finetune_operator.core.status.events import Event
from finetune_operator.settings import Settings

Object = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """An object to suspend, resume or delete; `uid` is a precondition."""

    kind: str
    name: str
    uid: str


@dataclass(frozen=True)
class Plan:
    """What to do, in this order: create, write status, suspend, resume, delete, post events.

    The status follows what was created and precedes what is deleted, so that the next plan repairs a crash in between.
    """

    create: tuple[Object, ...] = ()
    creates_more: bool = False
    """Whether the next plan creates more: what has a controller of its own is left alone until that is done, too."""
    status: Object | None = None
    """Merge patch of the status; None when nothing changes."""
    suspend: tuple[Target, ...] = ()
    resume: tuple[Target, ...] = ()
    delete: tuple[Target, ...] = ()
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
    """Seconds after which the plan changes without any event."""
    look_up: tuple[str, ...] | None = None
    """Before doing anything, read these Jobs and their pods from the API server, and plan again
    (Observation.looked_up): watches may be behind, and show nothing that has lost its label."""

    def with_job_uid(self, uid: str) -> "Plan":
        """Return the plan with the uid of the Job that it created in the status, as that of the latest attempt."""
        if not uid or not self.status or not self.status.get("attempts"):
            return self
        *earlier, latest = self.status["attempts"]
        return replace(self, status={**self.status, "attempts": [*earlier, {**latest, "jobUid": uid}]})


@dataclass(frozen=True)
class Step:
    """The conditions of the job and what they require; the rest of the plan follows from it."""

    state: JobConditions
    create: tuple[Object, ...] = ()
    suspend: tuple[Child, ...] = ()
    delete: tuple[Child, ...] = ()
    new_attempt: Attempt | None = None
    needs_look: bool = False
    """Whether it is right only if a fresh look at Jobs and pods shows the same."""
    recheck_after: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class View:
    """A job that is neither finished nor rejected, with its attempts up to date."""

    observed: Observed
    status: FineTuneJobStatus
    spec: FineTuneJobSpec
    history: Sequence[Attempt]
    ending: Ending | None
    report: TrainerReport | None
    """The trainer's report; the final one, if the last attempt ended now."""
    progress: Progress | None
    settings: Settings
    now: datetime
    earlier: EarlierAttempts | None = None
    """What is kept of attempts that are no longer in `history`."""

    @property
    def last(self) -> Attempt | None:
        return self.history[-1] if self.history else None

    @property
    def live(self) -> Attempt | None:
        return self.last if self.last and self.last.reason is None else None

    @property
    def unfinished(self) -> tuple[Child, ...]:
        """Jobs that could still run a pod."""
        return tuple(child for child in self.observed.children if not child.finished)
