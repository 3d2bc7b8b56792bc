"""The status rows of trials, and what follows from them: counts and the best."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from finetune_api import exit_codes, packed_jobs
from finetune_api.plain_text import one_line
from finetune_api.spec_pack import Objective
from finetune_api.sweep_packs import Holder
from finetune_api.sweep_status import MAX_VALUES, BestTrial, TrialCounts, TrialStatus
from finetune_api.sweep_trials import PlannedTrial, job_name
from finetune_api.trial_report import ENDED, TrialPhase, TrialReport
from finetune_operator.core.objects.observed import WAITING_PHASES, JobObject
from finetune_operator.core.status import deadlines
from finetune_operator.core.status.events import Event
from finetune_operator.core.sweep import said
from finetune_operator.core.sweep.observed import ObservedSweep
from finetune_operator.core.sweep.trials import Sweep


def table(
    observed: ObservedSweep,
    sweep: Sweep,
    known: Mapping[str, TrialStatus],
    jobs: Mapping[str, JobObject | None],
    held: Sequence[Holder],
) -> tuple[list[TrialStatus], list[Event]]:
    """Return the rows of the trials that have started, and events of what else became of any."""
    pack_of = {trial: holder.name for holder in held if holder.is_pack for trial in holder.trials}
    found, events, metric = list[TrialStatus](), list[Event](), sweep.spec.objective.metric
    alone = defaultdict[str, list[str]](list)
    for trial in sweep.trials:
        before, own = known.get(trial.name), jobs[trial.name]
        name = job_name(observed.sweep.name, pack_of[trial.name]) if trial.name in pack_of else ""
        shared = observed.jobs.get(name)
        if own is None and shared and shared.trial and shared.trial.packed is not None and _is_in(before, name):
            made = packed_row(trial, before, shared)
            if made is None and before:
                alone[name].append(trial.name)
            if made and made.phase == "Stopped" and not (before and before.phase in ENDED):
                events.append(said.stopped(f"trial {trial.name} stopped early: it fell behind the others of {name}"))
        else:
            made = row(trial, before, own, metric)
            if made and before and made.reason == said.DELETED != before.reason:
                events.append(said.deleted(trial.name, made.job_name or job_name(observed.sweep.name, trial.name)))
        found += [made] if made else []
    left = ((name, observed.jobs[name].trial, names) for name, names in alone.items())
    events += [said.left_alone(name, state.reason, len(names)) for name, state, names in left if state]
    return found, events


def _is_in(known: TrialStatus | None, job: str) -> bool:
    """Return whether a trial is in that pack, as far as its row tells: it has not gone on in a job of its own."""
    return known is None or known.job_name == job


def row(trial: PlannedTrial, known: TrialStatus | None, job: JobObject | None, metric: str) -> TrialStatus | None:
    """Return the row of a trial; None while it has not started.

    Args:
        trial: The trial.
        known: Its recorded row.
        job: Its FineTuneJob.
        metric: The objective's metric.
    """
    if job is None or job.trial is None:
        if known is None or known.phase in ("Succeeded", "Failed", "Stopped"):
            return known
        return known.model_copy(update={"phase": "Failed", "reason": said.DELETED})
    state = job.trial
    planned = trial if trial.values else replace(trial, values=state.drawn)
    known = known.model_copy(update={"job_name": None}) if known else _new(planned)
    if state.reason == exit_codes.GATE_NOT_PASSED:
        return known.model_copy(update={"phase": "Failed", "reason": state.reason})
    if state.outcome == "True":
        # One that published before it could be stopped counts.
        return known.model_copy(update={"phase": "Succeeded", "reason": None, "value": state.metrics.get(metric)})
    if known.phase == "Stopped":
        return known
    if state.outcome == "False":
        return known.model_copy(update={"phase": "Failed", "reason": state.reason or None})
    phase: TrialPhase = "Pending" if job.phase in WAITING_PHASES else "Running"
    return known.model_copy(update={"phase": "Suspended" if state.suspended else phase, "reason": None})


def packed_row(trial: PlannedTrial, known: TrialStatus | None, job: JobObject) -> TrialStatus | None:
    """Return the row of a trial that shares the FineTuneJob `job`; None once it has to go on in one of its own.

    It has to where its process ended for good before it did, or failed in a way that need not be its own fault.
    """
    state = job.trial
    assert state is not None and state.packed is not None
    known = known or _new(trial).model_copy(update={"job_name": job.name})
    told = state.packed.get(trial.name) or TrialReport(name=trial.name)
    if told.phase == "Succeeded":
        return known.model_copy(update={"phase": "Succeeded", "reason": None, "value": told.value})
    if known.phase in ENDED:
        return known
    if told.has_ended_for_good:
        return known.model_copy(update={"phase": told.phase, "reason": told.reason})
    if state.outcome == "Unknown":
        phase: TrialPhase = "Pending" if job.phase in WAITING_PHASES or told.phase == "Pending" else "Running"
        return known.model_copy(update={"phase": "Suspended" if state.suspended else phase, "reason": None})
    if state.reason == deadlines.PENDING:
        return known.model_copy(update={"phase": "Failed", "reason": state.reason})
    return None


def _new(trial: PlannedTrial) -> TrialStatus:
    return TrialStatus(name=trial.name, values=_shortened(one_line(trial.summary)))


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_VALUES else f"{text[: MAX_VALUES - 1]}…"


def counts(rows: Sequence[TrialStatus], total: int) -> TrialCounts:
    """Return how many trials stand where."""
    phases = Counter(row.phase for row in rows)
    ended = {"succeeded": phases["Succeeded"], "stopped": phases["Stopped"], "failed": phases["Failed"]}
    waiting = total - len(rows)
    return TrialCounts(total=total, waiting=waiting, active=total - waiting - sum(ended.values()), **ended)


def best(
    sweep: str, rows: Sequence[TrialStatus], jobs: dict[str, JobObject], objective: Objective, known: BestTrial | None
) -> BestTrial | None:
    """Return the best of the trials that succeeded; of equal ones the first."""
    found = [row for row in rows if row.phase == "Succeeded" and row.value is not None]
    if not found:
        return None
    sign = 1 if objective.minimizes else -1
    chosen = min(found, key=lambda row: sign * (row.value or 0.0))
    name = chosen.job_name or job_name(sweep, chosen.name)
    job = jobs.get(name)
    uri = known.uri if known and known.trial == chosen.name else None
    if job and job.trial:
        uri = job.trial.uri if job.trial.packed is None else packed_jobs.trial_uri(job.trial.uri, chosen.name)
    return BestTrial(trial=chosen.name, job_name=name, value=chosen.value or 0.0, uri=uri or None)
