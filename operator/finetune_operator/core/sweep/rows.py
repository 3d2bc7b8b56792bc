"""The status rows of trials, and what follows from them: counts and the best."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from finetune_api.plain_text import one_line
from finetune_api.sweep import Objective
from finetune_api.sweep_status import MAX_VALUES, BestTrial, TrialCounts, TrialPhase, TrialStatus
from finetune_api.sweep_trials import PlannedTrial, job_name
from finetune_operator.core.objects.observed import WAITING_PHASES, JobObject

DELETED = "Deleted"


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
        return known.model_copy(update={"phase": "Failed", "reason": DELETED})
    state = job.trial
    if known is None:
        planned = trial if trial.values else replace(trial, values=state.drawn)
        known = TrialStatus(name=trial.name, values=_shortened(one_line(planned.summary)))
    if state.outcome == "True":
        # One that published before it could be stopped counts.
        return known.model_copy(update={"phase": "Succeeded", "reason": None, "value": state.metrics.get(metric)})
    if known.phase == "Stopped":
        return known
    if state.outcome == "False":
        return known.model_copy(update={"phase": "Failed", "reason": state.reason or None})
    phase: TrialPhase = "Pending" if job.phase in WAITING_PHASES else "Running"
    return known.model_copy(update={"phase": "Suspended" if state.suspended else phase, "reason": None})


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
    name = job_name(sweep, chosen.name)
    job = jobs.get(name)
    uri = job.trial.uri if job and job.trial else known.uri if known and known.trial == chosen.name else None
    return BestTrial(trial=chosen.name, job_name=name, value=chosen.value or 0.0, uri=uri or None)
