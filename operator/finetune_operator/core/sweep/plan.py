"""The life cycle of a FineTuneSweep: decide what to do from what is observed. Pure and idempotent.

A sweep starts with a status write and nothing else. From then on the API server lets nobody change what its trials
follow from, so that a crash between any two writes finds the same trials again, under the same names.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_api import constants, plain_text
from finetune_api.sweep_packs import Holder
from finetune_api.sweep_status import FineTuneSweepStatus, TrialStatus
from finetune_api.sweep_trials import PlannedTrial, SweepError, job_name
from finetune_api.trial_report import ENDED
from finetune_operator.core.objects import raw, status_io
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.core.policy import INVALID, Rejection
from finetune_operator.core.status.conditions import ConditionValue, write_values
from finetune_operator.core.status.events import Event
from finetune_operator.core.sweep import rows, rungs, said, schedule, trials
from finetune_operator.core.sweep.observed import ObservedSweep
from finetune_operator.core.sweep.trials import Sweep
from finetune_operator.core.types import Plan, Target
from finetune_operator.settings import Settings

#: Trials created by one plan: the status between shows how far it is.
MAX_CREATES = 100
#: Trials whose values are drawn by one plan: with a thousand results one takes a fifth of a second.
MAX_DRAWS = 4
DEADLINE = "DeadlineExceeded"
NONE_SUCCEEDED = "NoTrialSucceeded"
_NOT_SUSPENDED = ConditionValue("False", "NotSuspended")
_ACCEPTED = ConditionValue("True", "Valid")


@dataclass(frozen=True)
class State:
    """The phase and the conditions of a sweep."""

    phase: str
    succeeded: ConditionValue
    suspended: ConditionValue = _NOT_SUSPENDED
    accepted: ConditionValue = _ACCEPTED


def plan(observed: ObservedSweep, settings: Settings, now: datetime) -> Plan:
    """Return what the sweep needs now. `now` has a time zone; its fraction of a second is dropped."""
    now = now.replace(microsecond=0)
    status = status_io.read_as(FineTuneSweepStatus, observed.sweep.status)
    if observed.sweep.deleting:
        return Plan()
    if status_io.is_terminal(status):
        return _clean_up(observed, status, now)
    sweep = trials.read(observed.sweep, is_new=status.start_time is None)
    if isinstance(sweep, Rejection):
        why = ConditionValue("False", sweep.reason, sweep.message)
        return _plan(observed, status, status, State("Failed", why, accepted=why), now)
    if status.start_time is None:
        packed_for = None if sweep.spec.packing == "disabled" else sweep.spec.parallelism
        counts = rows.counts((), len(sweep.trials))
        starting = status.model_copy(update={"start_time": now, "counts": counts, "packed_for": packed_for})
        return _plan(observed, status, starting, State("Running", _running(observed, (), starting)), now, again=0.0)
    return _go_on(observed, sweep, status, now)


def _go_on(observed: ObservedSweep, sweep: Sweep, status: FineTuneSweepStatus, now: datetime) -> Plan:
    """Bring the rows up to date, then decide on the trials and on the sweep."""
    known = {row.name: row for row in status.trials}
    jobs = {trial.name: observed.jobs.get(job_name(observed.sweep.name, trial.name)) for trial in sweep.trials}
    held = trials.holders(observed.sweep, sweep, status.packed_for)
    table, events = rows.table(observed, sweep, known, jobs, held)
    if sweep.spec.early_stopping:
        states = {name: job.trial for name, job in jobs.items() if job and job.trial}
        table, stopped = rungs.halve(table, states, sweep.spec.early_stopping)
        events += map(said.stopped, stopped)
    left = _deadline_left(sweep, status, now)
    if left is not None and left <= 0:
        stop = {"phase": "Stopped", "reason": DEADLINE}
        table = [row if row.phase in ENDED else row.model_copy(update=stop) for row in table]
    new = _with_rows(observed, sweep, status, table)
    over = _end(observed.sweep.name, sweep, new, left)
    if over is not None:
        return _plan(observed, status, new.model_copy(update={"completion_time": now}), over, now, events)
    return _advance(observed, sweep, held, status, new, now, events, left)


def _advance(
    observed: ObservedSweep,
    sweep: Sweep,
    held: Sequence[Holder],
    status: FineTuneSweepStatus,
    new: FineTuneSweepStatus,
    now: datetime,
    events: list[Event],
    left: float | None,
) -> Plan:
    """Suspend, resume or start trials, whichever is due."""
    live = [row for row in new.trials if row.phase not in ENDED]
    if sweep.spec.suspend:
        why = ConditionValue("True", "Suspended", "spec.suspend is true: trials save a checkpoint and stop")
        state = State("Suspended", ConditionValue("Unknown", why.reason, why.message), why)
        return _plan(observed, status, new, state, now, events, left, suspend=_switchable(observed, live, False))
    if _was_suspended(status) and (targets := _switchable(observed, live, True)):
        # Suspended stays True until no trial is left to resume: a crash between two of them forgets none.
        why = ConditionValue("True", "Resuming", "trials go on from their checkpoints")
        state = State("Suspended", ConditionValue("Unknown", why.reason, why.message), why)
        return _plan(observed, status, new, state, now, events, 0.0, resume=targets)
    if observed.create_blocked:
        why = ConditionValue("Unknown", observed.create_blocked.reason, observed.create_blocked.message)
        return _plan(observed, status, new, State("Running", why), now, events, left)
    waiting = schedule.waiting(observed, held, {row.name for row in new.trials})
    stopping = len(_stopped(observed, new))
    room = sweep.spec.parallelism - schedule.training(observed, held, live) - stopping
    due, drawn = schedule.due(waiting, room, is_idle=not live and not stopping), dict[str, PlannedTrial]()
    if sweep.spec.strategy == "tpe" and due:
        table = {row.name: row for row in new.trials}
        states = {row: job.trial for row in table if (job := _job(observed, row)) and job.trial}
        due = due[:MAX_DRAWS]
        try:
            planned = [trial for trial in sweep.trials if trial.name in {holder.name for holder in due}]
            found = trials.drawn(observed.sweep.name, sweep, table, states, planned)
            drawn = {trial.name: trial for trial in found}
        except SweepError as error:
            over = not new.counts.active
            why = ConditionValue("False" if over else "Unknown", INVALID, str(error))
            return _plan(observed, status, new, State("Failed" if over else "Running", why), now, events, left)
    due, more = due[:MAX_CREATES], len(due) > MAX_CREATES
    create = tuple(trials.job_of(observed.sweep, sweep, holder, drawn.get(holder.name)) for holder in due)
    # The rows of new trials, and the places of stopped ones, follow with the next plan.
    again = 0.0 if create or (stopping and waiting) else left
    state = State("Running", _running(observed, held, new))
    made = _plan(observed, status, new, state, now, events, again, create=create)
    return replace(made, creates_more=more)


def _job(observed: ObservedSweep, trial: str) -> JobObject | None:
    return observed.jobs.get(job_name(observed.sweep.name, trial))


def _with_rows(
    observed: ObservedSweep, sweep: Sweep, status: FineTuneSweepStatus, table: list[TrialStatus]
) -> FineTuneSweepStatus:
    jobs, objective = dict(observed.jobs), sweep.spec.objective
    changed = {
        "trials": table,
        "counts": rows.counts(table, len(sweep.trials)),
        "best": rows.best(observed.sweep.name, table, jobs, objective, status.best),
    }
    return status.model_copy(update=changed)


def _end(name: str, sweep: Sweep, status: FineTuneSweepStatus, left: float | None) -> State | None:
    """Return how the sweep `name` ended; None while it goes on."""
    counts = status.counts
    is_late, all_ended = left is not None and left <= 0, counts.waiting == 0 and counts.active == 0
    if not (is_late or all_ended):
        return None
    tally = said.ended(name, status, sweep.spec.objective)
    if all_ended:
        if counts.succeeded:
            return State("Succeeded", ConditionValue("True", "Succeeded", tally))
        return State("Failed", ConditionValue("False", NONE_SUCCEEDED, tally))
    message = f"not finished after activeDeadlineSeconds ({sweep.spec.active_deadline_seconds} s): {tally}"
    return State("Failed", ConditionValue("False", DEADLINE, message))


def _running(observed: ObservedSweep, held: Sequence[Holder], status: FineTuneSweepStatus) -> ConditionValue:
    return ConditionValue("Unknown", "Running", said.running(observed, held, status))


def _deadline_left(sweep: Sweep, status: FineTuneSweepStatus, now: datetime) -> float | None:
    limit = sweep.spec.active_deadline_seconds
    if limit is None or status.start_time is None:
        return None
    return (status.start_time + timedelta(seconds=limit) - now).total_seconds()


def _was_suspended(status: FineTuneSweepStatus) -> bool:
    known = status_io.condition(status, "Suspended")
    return known is not None and known.status == "True"


def _switchable(observed: ObservedSweep, found: Iterable[TrialStatus], asked: bool) -> tuple[Target, ...]:
    """Return the unfinished jobs of these trials whose spec.suspend is `asked`."""
    names = dict.fromkeys(_job_of(observed, row) for row in found)
    jobs = (observed.jobs.get(name) for name in names)
    return tuple(
        Target(constants.KIND, job.name, job.uid)
        for job in jobs
        if job and job.trial and job.trial.outcome == "Unknown" and not job.deleting
        if job.trial.asked_to_suspend == asked
    )


def _stopped(observed: ObservedSweep, status: FineTuneSweepStatus) -> tuple[Target, ...]:
    """Return the jobs of stopped trials that still run: their checkpoint stays, and the FineTuneJob can be looked at.

    A pack stops single trials itself; here it is stopped when all of its trials are.
    """
    live = {row.job_name for row in status.trials if row.phase not in ENDED}
    mine = (row for row in status.trials if row.phase == "Stopped" and row.job_name not in live - {None})
    return _switchable(observed, (row for row in mine if row.job_name is None or row.reason == DEADLINE), False)


def _job_of(observed: ObservedSweep, row: TrialStatus) -> str:
    return row.job_name or job_name(observed.sweep.name, row.name)


def _clean_up(observed: ObservedSweep, status: FineTuneSweepStatus, now: datetime) -> Plan:
    """Return the plan of a finished sweep: stop what was stopped, and delete it (never an adapter) after its TTL."""
    left = _ttl_left(observed, status, now)
    if left is not None and left <= 0:
        return Plan(delete=(Target(constants.SWEEP_KIND, observed.sweep.name, observed.sweep.uid),))
    return Plan(suspend=_stopped(observed, status), requeue_after=left)


def _ttl_left(observed: ObservedSweep, status: FineTuneSweepStatus, now: datetime) -> float | None:
    ttl = raw.at(json.loads(observed.sweep.spec), "ttlSecondsAfterFinished")
    if not isinstance(ttl, int) or status.completion_time is None:
        return None
    return (status.completion_time + timedelta(seconds=ttl) - now).total_seconds()


def _plan(
    observed: ObservedSweep,
    old: FineTuneSweepStatus,
    new: FineTuneSweepStatus,
    state: State,
    now: datetime,
    events: Sequence[Event] = (),
    again: float | None = None,
    create: tuple[raw.Raw, ...] = (),
    suspend: tuple[Target, ...] = (),
    resume: tuple[Target, ...] = (),
) -> Plan:
    """Complete a decision to a plan: the status with its conditions, what was stopped, and the events."""
    counts, generation = new.counts, observed.sweep.generation
    values = {"Accepted": state.accepted, "Suspended": state.suspended, "Succeeded": state.succeeded}
    changed = {
        "phase": state.phase,
        "observed_generation": generation,
        "conditions": write_values(values, old.conditions, generation, now),  # type: ignore[arg-type]
        "summary": f"{counts.total - counts.waiting - counts.active}/{counts.total}",
    }
    if state.succeeded.status != "Unknown":
        changed |= {"completion_time": now}
        left = _ttl_left(observed, new.model_copy(update=changed), now)
        again = left
    new = new.model_copy(update=changed)
    written = plain_text.plain_values(found := new.manifest())
    if written != found:
        new = FineTuneSweepStatus.model_validate(written)
    return Plan(
        create=create,
        status=status_io.merge_patch(json.loads(observed.sweep.status), written) or None,
        suspend=(*suspend, *_stopped(observed, new)),
        resume=resume,
        events=(*said.events(old, new), *events),
        requeue_after=again,
    )
