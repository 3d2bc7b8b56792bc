"""The attempts so far: what status recorded, brought up to date with the Jobs and pods that exist."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt, FineTuneJobStatus, TrainerReport
from finetune_operator.core.attempts import (
    failure,
    pod_set,
    progress,
    spec_revision,
)
from finetune_operator.core.attempts.failure import Ending
from finetune_operator.core.objects.observed import (
    Child,
    JobObject,
    Observed,
    Pod,
)

#: Attempts that count are kept for good (there are at most 100); of the others the latest few.
KEPT_NOT_COUNTED = 10
#: How long a finished Job with an exit code missing is given before its pods are looked for.
SETTLE_SECONDS = 5
_MOST_SKEW_SECONDS = 60


def job_name(job: JobObject, number: int) -> str:
    """Name of the Job of attempt `number` (from 1). The same each time, so that it can never be made twice."""
    return f"{job.name}-{number}"


def number(attempt: Attempt) -> int:
    """Which attempt this is, from 1; 0 when its name does not say."""
    suffix = attempt.job_name.rpartition("-")[2]
    return int(suffix) if suffix.isdecimal() and len(suffix) < 10 else 0


def next_number(history: Sequence[Attempt], observed: Observed) -> int:
    """One more than any attempt that is recorded or exists."""
    return 1 + max([0, *map(number, history), *(child.attempt for child in observed.children)])


def pods_of(observed: Observed, name: str) -> list[Pod]:
    """The pods of the Job `name`, lowest rank first."""
    owners = {child.uid for child in observed.children if child.name == name}
    attempt = number(Attempt(job_name=name))
    mine = [pod for pod in observed.pods if pod.owner in owners or (not owners and pod.attempt == attempt)]
    return sorted(mine, key=lambda pod: (pod.index, pod.name))


def child_of(observed: Observed, name: str) -> Child | None:
    return next((child for child in observed.children if child.name == name), None)


@dataclass(frozen=True)
class AttemptHistory:
    """The attempts with every end filled in, oldest first."""

    history: list[Attempt]
    ending: Ending | None = None
    """How the last one ended, if it ended just now."""
    report: TrainerReport | None = None
    """What its trainer says; at its end, the last word."""
    needs_pod_refresh: bool = False
    """Whether it may have ended, which only a fresh look at its pods can tell."""


def update(observed: Observed, status: FineTuneJobStatus, spec: FineTuneJobSpec, now: datetime) -> AttemptHistory:
    """The recorded attempts, brought up to date."""
    history = {attempt.job_name: attempt for attempt in status.attempts}
    for child in observed.children:
        said = spec_revision.SUPERSEDED if spec_revision.is_superseded(child, status, spec) else None
        history.setdefault(child.name, Attempt(job_name=child.name, started_at=child.created_at, message=said))
    current: list[Attempt] = []
    story = AttemptHistory(current)
    for attempt in sorted(history.values(), key=number):
        if attempt.reason is None:
            report = _report(attempt, observed)
            attempt = _updated(attempt, observed, report, now)
            found = _detect_ending(attempt, observed, status, spec, now)
            if isinstance(found, Ending):
                attempt = close(attempt, observed, found, now)
                story = AttemptHistory(current, found, found.report, story.needs_pod_refresh)
            else:
                story = AttemptHistory(current, None, report, story.needs_pod_refresh or found.needs_pod_refresh)
        current.append(attempt)
    return replace(story, history=_pruned(current))


def _pruned(history: list[Attempt]) -> list[Attempt]:
    uncounted = [attempt for attempt in history if attempt.reason in failure.NOT_COUNTED_AS_FAILURE]
    dropped = {attempt.job_name for attempt in uncounted[:-KEPT_NOT_COUNTED]}
    return [attempt for attempt in history if attempt.job_name not in dropped]


def _report(attempt: Attempt, observed: Observed) -> TrainerReport | None:
    """What the trainer of the attempt says, if one runs."""
    leads = any(pod.running and pod.live and pod.index == 0 for pod in pods_of(observed, attempt.job_name))
    return observed.report if leads else None


def _updated(attempt: Attempt, observed: Observed, report: TrainerReport | None, now: datetime) -> Attempt:
    """The attempt with what its pods and its trainer say of it while it lives."""
    mine = pods_of(observed, attempt.job_name)
    if attempt.run_seconds is None:
        starts = [pod.started_at for pod in mine if pod.started_at]
        attempt = attempt.model_copy(update={"started_at": min(starts, default=attempt.started_at)})
    # The time of a pod that ended by itself is added up with the attempt's end, in the same write.
    attempt = pod_set.with_run_time(attempt, [pod for pod in mine if not pod.exit or pod.deleting or pod.disruption])
    return progress.record_report(attempt, report, now) if report else attempt


@dataclass(frozen=True)
class _StillOpen:
    """An attempt that is not over, as far as we know."""

    needs_pod_refresh: bool = False


def _detect_ending(
    attempt: Attempt, observed: Observed, status: FineTuneJobStatus, spec: FineTuneJobSpec, now: datetime
) -> Ending | _StillOpen:
    """How an attempt that was not over is over now. Jobs and pods are watched by different streams, so an end that no
    pod's exit code bears out is believed only after a look at the pods themselves.
    """
    mine, child = pods_of(observed, attempt.job_name), child_of(observed, attempt.job_name)
    late = child is not None and is_settled(child, now)
    if any(pod.live for pod in mine):
        return _StillOpen(needs_pod_refresh=late and not observed.pods_refreshed)
    if child and child.finished:
        told = pod_set.current(mine)
        if sum(pod.exit is not None for pod in told) < spec.resources.nodes and not (late and observed.pods_refreshed):
            return _StillOpen(needs_pod_refresh=late)
        memory = spec.resources.memory
        return _map_superseded(attempt, failure.classify_exit(child, told, "" if memory is None else str(memory)))
    stopping = spec.suspend or any(c.type == "Suspended" and c.status == "True" for c in status.conditions)
    is_stopped = child is None or (child.suspended and not child.active and not child.queued)
    if child is not None and not (stopping and is_stopped):
        return _StillOpen()
    if not observed.pods_refreshed:
        return _StillOpen(needs_pod_refresh=True)
    if is_superseded(attempt):
        return Ending(failure.SPEC_CHANGED, spec_revision.SUPERSEDED, finished_at=now)
    if stopping:
        return Ending(failure.SUSPENDED, "spec.suspend stopped it", finished_at=now)
    return Ending(failure.JOB_DELETED, f"Job {attempt.job_name} was deleted by someone else", finished_at=now)


def is_superseded(attempt: Attempt) -> bool:
    """Whether an attempt that is not over runs another spec than the job's."""
    return attempt.reason is None and attempt.message == spec_revision.SUPERSEDED


def _map_superseded(attempt: Attempt, ending: Ending) -> Ending:
    """What a superseded attempt ended with says nothing of the spec as it is; but what is published is published."""
    if not is_superseded(attempt):
        return ending
    if ending.reason == failure.SUCCEEDED:
        return replace(ending, message=f"{ending.message}, but by the spec as it was: {spec_revision.SUPERSEDED}")
    return Ending(failure.SPEC_CHANGED, spec_revision.SUPERSEDED, ending.exit_code, ending.finished_at)


def is_settled(child: Child, now: datetime) -> bool:
    """Whether the Job finished so long ago that what its pods told should be here. The API server's clock may be ahead
    of ours, but not by an hour.
    """
    since = (now - child.finished_at).total_seconds() if child.finished_at else SETTLE_SECONDS
    return bool(child.finished) and not -_MOST_SKEW_SECONDS < since < SETTLE_SECONDS


def close(attempt: Attempt, observed: Observed, ending: Ending, now: datetime) -> Attempt:
    """The attempt with its end."""
    report = ending.report
    plan = report.execution_plan if report else None
    end = ending.finished_at or now
    return attempt.model_copy(
        update={
            "reason": ending.reason,
            "message": ending.message[:1024],
            "exit_code": ending.exit_code,
            "finished_at": end,
            "last_step": report.progress.step if report else attempt.last_step,
            "run_seconds": pod_set.run_seconds_of(attempt, pods_of(observed, attempt.job_name), end),
            "micro_batch_size": plan.micro_batch_size if plan and plan.micro_batch_size else attempt.micro_batch_size,
        }
    )
