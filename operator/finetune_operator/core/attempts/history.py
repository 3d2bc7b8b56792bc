"""The attempts so far: those recorded in the status, updated from the Jobs and pods that exist."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from finetune_api import packed_jobs
from finetune_api.spec import FineTuneJobSpec, Metadata
from finetune_api.status import Attempt, EarlierAttempts, FineTuneJobStatus, TrainerReport
from finetune_operator.core.attempts import (
    failure,
    pod_set,
    progress,
    spec_revision,
    usage,
)
from finetune_operator.core.attempts.failure import Ending
from finetune_operator.core.objects.observed import Child, JobObject, Observed
from finetune_operator.core.objects.pod import Pod

#: Attempts that count as failures are all kept (at most 100); of the others only the latest.
KEPT_NOT_COUNTED = 10
#: The most that are listed: more than maxAttempts can be. An older status may hold more.
MAX_LISTED = 128
#: Wait this long for the exit codes of a finished Job before reading its pods from the API server.
SETTLE_SECONDS = 5
_MOST_SKEW_SECONDS = 60
#: Give the other containers of a pod this long to end after the trainer, as native sidecars do.
HELD_OPEN = timedelta(seconds=30)
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


def job_name(job: JobObject, number: int) -> str:
    """Return the name of the Job of attempt `number` (from 1). It is always the same, so no Job is created twice."""
    return f"{job.name}-{number}"


def number(attempt: Attempt) -> int:
    """Return the number of an attempt, from 1; 0 when its name does not hold one."""
    suffix = attempt.job_name.rpartition("-")[2]
    return int(suffix) if suffix.isdecimal() and len(suffix) < 10 else 0


def job_names(job: JobObject, attempts: Sequence[Attempt]) -> list[str]:
    """Return the names of their Jobs, without those that only somebody who writes statuses by hand can have made."""
    return [attempt.job_name for attempt in attempts if attempt.job_name == job_name(job, number(attempt))]


def next_number(history: Sequence[Attempt], observed: Observed) -> int:
    """Return one more than the number of any attempt that is recorded or exists."""
    return 1 + max([0, *map(number, history), *(child.attempt for child in observed.children)])


def pods_of(observed: Observed, name: str) -> list[Pod]:
    """Return the pods of the Job `name`, lowest rank first."""
    owners = {child.uid for child in observed.children if child.name == name}
    attempt = number(Attempt(job_name=name))
    mine = [pod for pod in observed.pods if pod.owner in owners or (not owners and pod.attempt == attempt)]
    return sorted(mine, key=lambda pod: (pod.index, pod.name))


def child_of(observed: Observed, name: str) -> Child | None:
    return next((child for child in observed.children if child.name == name), None)


@dataclass(frozen=True)
class AttemptHistory:
    """All attempts, oldest first, with the ending of each that has ended."""

    history: list[Attempt]
    ending: Ending | None = None
    """How the last one ended, if it ended now."""
    report: TrainerReport | None = None
    """The report of its trainer; at its end, the final one."""
    earlier: EarlierAttempts | None = None
    """What is kept of those that are no longer listed."""
    needs_look: bool = False
    """Whether it may have ended, which only a fresh list of its pods can tell."""


def update(observed: Observed, status: FineTuneJobStatus, spec: FineTuneJobSpec, now: datetime) -> AttemptHistory:
    """Return the attempts, updated from the Jobs and pods."""
    history = {attempt.job_name: attempt for attempt in status.attempts}
    for child in observed.children:
        attempt = history.get(child.name) or Attempt(job_name=child.name, started_at=child.created_at)
        why = None if attempt.reason else spec_revision.why_superseded(child, spec)
        changed = {"job_uid": child.uid, **({"message": why} if why else {})}
        history[child.name] = attempt.model_copy(update=changed)
    current: list[Attempt] = []
    attempts = AttemptHistory(current)
    for attempt in sorted(history.values(), key=number):
        if attempt.reason is None:
            report = _report(attempt, observed)
            attempt = _updated(attempt, observed, report, now)
            found = _detect_ending(attempt, observed, status, spec, now)
            if isinstance(found, Ending):
                attempt = close(attempt, observed, found, now)
                attempts = AttemptHistory(current, found, found.report, needs_look=attempts.needs_look)
            else:
                needs_look = attempts.needs_look or found.needs_look
                attempts = AttemptHistory(current, None, report, needs_look=needs_look)
            attempt = attempt.model_copy(update={"gpu": usage.gpu_type(attempt.gpu, spec)})
        current.append(attempt)
    kept = _pruned(current)
    return replace(attempts, history=kept, earlier=_folded(status.earlier_attempts, current, kept))


def _pruned(history: list[Attempt]) -> list[Attempt]:
    uncounted = [attempt for attempt in history if attempt.reason in failure.NOT_COUNTED_AS_FAILURE]
    dropped = {attempt.job_name for attempt in uncounted[:-KEPT_NOT_COUNTED]}
    return [attempt for attempt in history if attempt.job_name not in dropped][-MAX_LISTED:]


def _folded(
    earlier: EarlierAttempts | None, history: Sequence[Attempt], kept: Sequence[Attempt]
) -> EarlierAttempts | None:
    """Return what is kept of all attempts but `kept`: their run time still counts toward activeDeadlineSeconds."""
    if len(kept) == len(history):
        return earlier
    names = {attempt.job_name for attempt in kept}
    dropped = [attempt for attempt in history if attempt.job_name not in names]
    before = earlier or EarlierAttempts()
    seconds = sum(int(pod_set.run_seconds([attempt], None, _LONG_AGO)) for attempt in dropped)
    most = 2**53
    return EarlierAttempts(
        count=min(before.count + len(dropped), most), run_seconds=min(before.run_seconds + seconds, most)
    )


def _report(attempt: Attempt, observed: Observed) -> TrainerReport | None:
    """Return the report of the attempt's trainer, if one runs."""
    leads = any(pod.running and pod.live and pod.index == 0 for pod in pods_of(observed, attempt.job_name))
    return observed.report if leads else None


def _updated(attempt: Attempt, observed: Observed, report: TrainerReport | None, now: datetime) -> Attempt:
    """Return a live attempt, updated from its pods and its report."""
    mine = pods_of(observed, attempt.job_name)
    if attempt.run_seconds is None:
        starts = [pod.started_at for pod in mine if pod.started_at]
        attempt = attempt.model_copy(update={"started_at": min(starts, default=attempt.started_at)})
    # The run time of a pod that ended by itself is added with the attempt's end, in the same write.
    attempt = pod_set.with_run_time(attempt, [pod for pod in mine if not pod.exit or pod.deleting or pod.disruption])
    attempt = pod_set.with_disruptions(attempt, mine)
    if not attempt.message and (why := pod_set.released(observed, attempt.job_name)):
        attempt = attempt.model_copy(update={"message": why})
    return progress.record_report(attempt, report, now) if report else attempt


@dataclass(frozen=True)
class _StillOpen:
    """An attempt that has not ended, as far as we know."""

    needs_look: bool = False


def _detect_ending(
    attempt: Attempt, observed: Observed, status: FineTuneJobStatus, spec: FineTuneJobSpec, now: datetime
) -> Ending | _StillOpen:
    """Return how an open attempt has ended, or that it is still open.

    Jobs and pods come from different watches, so an end without an exit code counts only after the pods were read from
    the API server.
    """
    mine, child = pods_of(observed, attempt.job_name), child_of(observed, attempt.job_name)
    settled = child is not None and is_settled(child, now)
    memory = "" if spec.resources.memory is None else str(spec.resources.memory)
    places = failure.Places(*packed_jobs.places(Metadata(name=observed.job.name, uid=observed.job.uid), spec))
    if child and not child.finished and is_held_open(mine, spec.resources.nodes, now):
        return _map_superseded(attempt, failure.classify_exit(child, pod_set.current(mine), places, memory))
    if any(pod.live for pod in mine):
        return _StillOpen(needs_look=settled and not observed.looked_up)
    if child and child.finished:
        last = pod_set.current(mine)
        if sum(pod.exit is not None for pod in last) < spec.resources.nodes and not (settled and observed.looked_up):
            return _StillOpen(needs_look=settled)
        return _map_superseded(attempt, failure.classify_exit(child, last, places, memory))
    stopping = spec.suspend or any(c.type == "Suspended" and c.status == "True" for c in status.conditions)
    is_stopped = child is None or (child.suspended and not (child.active or child.terminating) and not child.queued)
    if child is not None and not (stopping and is_stopped):
        return _StillOpen()
    if not observed.looked_up:
        return _StillOpen(needs_look=True)
    if is_superseded(attempt):
        return Ending(failure.SPEC_CHANGED, attempt.message or "", finished_at=now)
    if stopping:
        return Ending(failure.SUSPENDED, "stopped by spec.suspend", finished_at=now)
    message = attempt.message or f"Job {attempt.job_name} was deleted by someone else"
    return Ending(failure.JOB_DELETED, message, finished_at=now)


def held_open_until(pods: Sequence[Pod], nodes: int) -> datetime | None:
    """Return when to stop waiting for a Job whose outcome is known, but whose pods other containers keep running.

    It is known once one trainer has failed, or all have ended. Pods that were told to stop end by themselves.
    """
    last = [pod for pod in pod_set.current(pods) if pod.exit and not pod.deleting and not pod.disruption]
    held = [pod.exit.finished_at for pod in last if pod.held_open and pod.exit and pod.exit.finished_at]
    is_known = len(last) == nodes or any(pod.exit and pod.exit.code for pod in last if pod.held_open)
    return max(held) + HELD_OPEN if held and is_known else None


def is_held_open(pods: Sequence[Pod], nodes: int, now: datetime) -> bool:
    """Return whether the trainers' own end has to decide, because the Job's will not come."""
    until = held_open_until(pods, nodes)
    return until is not None and now >= until


def is_superseded(attempt: Attempt) -> bool:
    """Return whether an open attempt runs another spec than the job's."""
    return attempt.reason is None and attempt.message in (spec_revision.SPEC_SUPERSEDED, spec_revision.IMAGE_SUPERSEDED)


def _map_superseded(attempt: Attempt, ending: Ending) -> Ending:
    """Map the outcome of an attempt that ran an outdated spec; only success is kept."""
    if not is_superseded(attempt):
        return ending
    if ending.reason in failure.ENDED_WELL:
        return replace(ending, message=f"{ending.message}, but with an outdated spec: {attempt.message}")
    return Ending(failure.SPEC_CHANGED, attempt.message or "", ending.exit_code, ending.finished_at)


def is_settled(child: Child, now: datetime) -> bool:
    """Return whether the Job finished so long ago that the last events of its pods should be here.

    The API server's clock may be ahead of ours, but not by more than a minute.
    """
    since = (now - child.finished_at).total_seconds() if child.finished_at else SETTLE_SECONDS
    return bool(child.finished) and not -_MOST_SKEW_SECONDS < since < SETTLE_SECONDS


def close(attempt: Attempt, observed: Observed, ending: Ending, now: datetime) -> Attempt:
    """Return the attempt with its ending filled in."""
    report = ending.report
    plan = report.execution_plan if report else None
    end = ending.finished_at or now
    return attempt.model_copy(
        update={
            "reason": ending.reason,
            "message": ending.message[:1024],
            "exit_code": ending.exit_code,
            "node": ending.node[:253] or None,
            "finished_at": end,
            "gpu": attempt.gpu or (report.gpu if report else None),
            "last_step": report.progress.step if report else attempt.last_step,
            "resumed_from": (report.resumed_from if report else None) or attempt.resumed_from,
            "run_seconds": pod_set.run_seconds_of(attempt, pods_of(observed, attempt.job_name), end),
            "micro_batch_size": plan.micro_batch_size if plan and plan.micro_batch_size else attempt.micro_batch_size,
        }
    )
