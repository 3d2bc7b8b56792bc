"""The pods of one attempt as a set: which of them count, how long they ran, whether one is unreachable."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta

from finetune_api.status import Attempt
from finetune_operator.core.objects.observed import Observed
from finetune_operator.core.objects.pod import Pod

#: Tolerated difference between the clocks of nodes, API server and operator.
SKEW = timedelta(seconds=30)
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


def leader(observed: Observed) -> Pod | None:
    """Return the running rank-0 pod of the latest attempt: the one whose trainer reports progress."""
    if observed.job.deleting:
        return None
    mine = (pod for pod in observed.pods if pod.owner in observed.open_jobs)
    running = (pod for pod in mine if pod.index == 0 and pod.running and pod.ip and not pod.exit)
    return max(running, key=lambda pod: (pod.attempt, pod.created_at), default=None)


def current(pods: Iterable[Pod]) -> list[Pod]:
    """Return the last pod of each rank, lowest first; the Job replaced the others."""
    last = {pod.index: pod for pod in sorted(pods, key=_age)}
    return [last[index] for index in sorted(last)]


def _age(pod: Pod) -> tuple[datetime, bool, datetime, int]:
    """Return a sort key by age. Of two pods of the same whole second, the later came after the first's end."""
    ended = (pod.exit.finished_at if pod.exit else None) or _LONG_AGO
    return pod.created_at, pod.live, ended, pod.version


def running_since(pods: Iterable[Pod]) -> datetime | None:
    """Return when the first of the running pods started."""
    return min((pod.started_at for pod in pods if pod.running and pod.live and pod.started_at), default=None)


def unreachable(pods: Iterable[Pod], now: datetime) -> Pod | None:
    """Return a pod whose grace period is over but whose node has not confirmed its end: it may still write."""
    return next((pod for pod in pods if pod.live and pod.stop_by and now >= pod.stop_by + SKEW), None)


def unreachable_at(pods: Iterable[Pod]) -> datetime | None:
    """Return when `unreachable` will find a pod if nothing changes."""
    return min((pod.stop_by + SKEW for pod in pods if pod.live and pod.stop_by), default=None)


def released(observed: Observed, job_name: str) -> str:
    """Return what to say of a running pod that its Job has let go; empty where there is none."""
    name = next((each for each in observed.released if each.startswith(f"{job_name}-")), "")
    return name and (
        f"pod {name} runs, but Job {job_name} controls it no more: somebody, or a webhook, changed its labels or owner."
        " The Job is deleted, so that no two trainers write at once; the next attempt waits for that pod: delete it"
    )


def with_run_time(attempt: Attempt, pods: Sequence[Pod]) -> Attempt:
    """Return the attempt with the run time of its ended pods added.

    Each pod counts once, when it has ended, so the recorded time stays right after its pods are gone.
    """
    seconds, until = attempt.run_seconds, attempt.ran_until
    started = sorted((pod for pod in pods if pod.started_at), key=lambda pod: pod.started_at or _LONG_AGO)
    if started and seconds is None:
        seconds = 0
    for pod in started:
        end = pod.exit.finished_at if pod.exit else None
        begin = max(pod.started_at or _LONG_AGO, until or _LONG_AGO)
        if seconds is not None and end and end > begin:
            seconds, until = seconds + int((end - begin).total_seconds()), end
    return attempt.model_copy(update={"run_seconds": seconds, "ran_until": until})


def with_disruptions(attempt: Attempt, pods: Sequence[Pod]) -> Attempt:
    """Return the attempt with the disruptions of its pods counted, each once, and why the last one happened.

    The pods are replaced and forgotten, so what was counted is told by its time.
    """
    before = attempt.disrupted_at or _LONG_AGO
    found = {pod.disrupted_at or pod.created_at: pod for pod in pods if pod.disruption}
    new = sorted(moment for moment in found if moment > before)
    if not new:
        return attempt
    last = found[new[-1]]
    why = ": ".join(part for part in (f"pod {last.name}", last.reason, last.disruption) if part)
    return attempt.model_copy(
        update={
            "disruptions": (attempt.disruptions or 0) + len(new),
            "disrupted_at": new[-1].replace(microsecond=0),
            "disruption": why[:512],
        }
    )


def run_seconds(history: Sequence[Attempt], since: datetime | None, now: datetime) -> float:
    """Return the seconds that all attempts have run; `since` is the start of the pods that run now."""
    total = 0.0
    for attempt in history:
        if attempt.run_seconds is not None:
            total += attempt.run_seconds
        elif attempt.reason and attempt.started_at and attempt.finished_at:  # recorded by an older version
            total += max(0.0, (attempt.finished_at - attempt.started_at).total_seconds())
    if since is not None:
        ran_until = history[-1].ran_until if history else None
        total += max(0.0, (now - max(since, ran_until or since)).total_seconds())
    return total


def run_seconds_of(attempt: Attempt, pods: Sequence[Pod], end: datetime) -> int:
    """Return the seconds that an attempt which ended at `end` has run.

    Nobody saw the end of pods that are gone without an exit, and the operator may have been down since: they count
    until their trainer last reported something new.
    """
    timed, since = with_run_time(attempt, pods), running_since(current(pods))
    if since is None and timed.run_seconds is not None and timed.ran_until is None:
        since = timed.started_at
        end = min(end, timed.heard_at or since or end)
    return int(run_seconds([timed], since, end))
