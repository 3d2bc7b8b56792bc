"""The attempts so far: what status recorded, brought up to date with the Jobs and pods that exist."""

from collections.abc import Sequence
from datetime import datetime

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt, FineTuneJobStatus
from finetune_operator.core import failure
from finetune_operator.core.failure import Ending
from finetune_operator.core.observed import Child, JobObject, Observed, Pod

#: Attempts that count are kept for good (there are at most 100); of the others the latest few.
KEPT_UNCOUNTED = 10
#: How long a finished Job without any exit code is given before its pods count as lost.
SETTLE_SECONDS = 5


def job_name(job: JobObject, number: int) -> str:
    """Name of the Job of attempt `number` (from 1). The same each time, so that it can never be made twice."""
    return f"{job.name}-{number}"


def number(attempt: Attempt) -> int:
    """Which attempt this is, from 1; 0 when its name does not say."""
    suffix = attempt.job_name.rpartition("-")[2]
    return int(suffix) if suffix.isdecimal() else 0


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


def update(
    observed: Observed, status: FineTuneJobStatus, spec: FineTuneJobSpec, now: datetime
) -> tuple[list[Attempt], Ending | None]:
    """The attempts with every end filled in, oldest first, and how the last one ended if it ended just now."""
    history = {attempt.job_name: attempt for attempt in status.attempts}
    for child in observed.children:
        history.setdefault(child.name, Attempt(job_name=child.name, started_at=child.created_at))
    ending: Ending | None = None
    current = []
    for attempt in sorted(history.values(), key=number):
        if attempt.reason is None:
            started = _started(attempt, observed)
            ending = _ending(started, observed, status, spec, now)
            attempt = _close(started, ending, status, now) if ending else started
        current.append(attempt)
    return _pruned(current), ending


def _pruned(history: list[Attempt]) -> list[Attempt]:
    uncounted = [attempt for attempt in history if attempt.reason in failure.UNCOUNTED]
    dropped = {attempt.job_name for attempt in uncounted[:-KEPT_UNCOUNTED]}
    return [attempt for attempt in history if attempt.job_name not in dropped]


def _started(attempt: Attempt, observed: Observed) -> Attempt:
    """The attempt with what its pods and trainer say of it while it lives."""
    starts = [pod.started_at for pod in pods_of(observed, attempt.job_name) if pod.started_at]
    plan = observed.report.execution_plan if observed.report else None
    micro = plan.micro_batch_size if plan and plan.micro_batch_size else attempt.micro_batch_size
    started_at = min(starts, default=attempt.started_at)
    return attempt.model_copy(update={"started_at": started_at, "micro_batch_size": micro})


def _ending(
    attempt: Attempt, observed: Observed, status: FineTuneJobStatus, spec: FineTuneJobSpec, now: datetime
) -> Ending | None:
    """How an attempt that was not over is over now; None while it is not."""
    pods, child = pods_of(observed, attempt.job_name), child_of(observed, attempt.job_name)
    if any(pod.live for pod in pods):
        return None
    if child and child.finished:
        if not any(pod.exit for pod in pods) and _is_fresh(child, now):
            return None
        memory = spec.resources.memory
        return failure.judge(child, pods, "" if memory is None else str(memory))
    stopping = spec.suspend or any(c.type == "Suspended" and c.status == "True" for c in status.conditions)
    if stopping and (child is None or (child.suspended and not child.active and not child.queued)):
        return Ending(failure.SUSPENDED, "spec.suspend stopped it", finished_at=now)
    if child is None:
        return Ending(failure.JOB_DELETED, f"Job {attempt.job_name} was deleted by someone else", finished_at=now)
    return None


def _is_fresh(child: Child, now: datetime) -> bool:
    """Whether its pods' last state may still be on its way: Jobs and pods are watched by different streams."""
    return child.finished_at is not None and 0 <= (now - child.finished_at).total_seconds() < SETTLE_SECONDS


def _close(attempt: Attempt, ending: Ending, status: FineTuneJobStatus, now: datetime) -> Attempt:
    report = ending.report or None
    step = report.progress.step if report else (status.progress.step if status.progress else None)
    plan = report.execution_plan if report else None
    return attempt.model_copy(
        update={
            "reason": ending.reason,
            "message": ending.message[:1024],
            "exit_code": ending.exit_code,
            "finished_at": ending.finished_at or now,
            "last_step": step,
            "micro_batch_size": plan.micro_batch_size if plan and plan.micro_batch_size else attempt.micro_batch_size,
        }
    )


def run_seconds(history: Sequence[Attempt], started: bool, now: datetime) -> float:
    """Seconds that all attempts have run; the last, unfinished one counts from when `started` (its pods run)."""
    total = 0.0
    for attempt in history:
        end = attempt.finished_at if attempt.reason else (now if started else None)
        if attempt.started_at and end:
            total += max(0.0, (end - attempt.started_at).total_seconds())
    return total
