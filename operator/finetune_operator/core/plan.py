"""The life of a FineTuneJob: what is observed -> what to do. Pure, and the same every time it is asked."""

from datetime import datetime

from finetune_api import names
from finetune_api.status import Attempt
from finetune_operator.core import (
    attempts,
    children,
    conclude,
    conditions,
    deadlines,
    failure,
    progress,
    rules,
    statuses,
    waiting,
)
from finetune_operator.core.conditions import Scene
from finetune_operator.core.failure import Stop
from finetune_operator.core.observed import Observed
from finetune_operator.core.steps import Plan, Step, View
from finetune_operator.settings import Settings


def plan(observed: Observed, settings: Settings, now: datetime) -> Plan:
    """What the job needs now. `now` has a zone; sub-second parts are dropped, for statuses hold whole seconds."""
    now = now.replace(microsecond=0)
    status = statuses.read(observed.job.status)
    if observed.job.deleting:
        return Plan()
    if statuses.is_over(status):
        return conclude.after_the_end(observed, status, now)
    spec = rules.read_spec(observed.job)
    if isinstance(spec, rules.Refusal):
        return conclude.conclude(observed, status, Step(conditions.refused(spec.reason, spec.message)), now)
    history, ending = attempts.update(observed, status, spec, now)
    report = ending.report if ending else observed.report
    view = View(observed, status, spec, history, ending, progress.merge(status.progress, report, now), settings, now)
    return conclude.conclude(observed, status, _step(view), now, view)


def _step(view: View) -> Step:
    """The lifecycle, from the end to the beginning."""
    retry = None
    if view.last and not view.live:
        if view.last.reason == failure.SUCCEEDED:
            return Step(conditions.succeeded(view.spec.output.uri, view.last.message or ""))
        verdict = failure.verdict(view.history, view.spec, view.observed.job.uid)
        if isinstance(verdict, Stop):
            return Step(conditions.failed(verdict.reason, verdict.message))
        retry = verdict
    if not view.history and (refusal := rules.refuse(view.observed.job, view.spec, view.settings)):
        return Step(conditions.refused(refusal.reason, refusal.message))
    if late := _late(view):
        return Step(late)
    if view.spec.suspend:
        return _suspend(view)
    if view.live:
        return _watch(view, view.live)
    if retry and retry.at > view.now:
        return _back_off(view, retry)
    return _start(view)


def _suspend(view: View) -> Step:
    """Stop the running attempt gently: its trainer saves a checkpoint within the grace period."""
    if view.live is None:
        return Step(conditions.suspended("Suspended", "spec.suspend is true"), delete=view.unfinished)
    scene = conditions.suspended("Suspending", "waiting for the trainer to save a checkpoint and stop")
    # Kueue would unsuspend an admitted Job, so a queued one is deleted; its pods get the same grace.
    ours = tuple(child for child in view.unfinished if not child.queued and not child.suspended)
    queued = tuple(child for child in view.unfinished if child.queued and not child.deleting)
    return Step(scene, suspend=ours, delete=queued)


def _watch(view: View, attempt: Attempt) -> Step:
    """An attempt is under way: say why it waits, or what it does."""
    observed, nodes = view.observed, view.spec.resources.nodes
    child, pods = attempts.child_of(observed, attempt.job_name), attempts.pods_of(observed, attempt.job_name)
    if child is None or child.deleting:
        return Step(conditions.waiting("Stopping", f"Job {attempt.job_name} is gone; waiting for its pods to end"))
    if child.suspended and not child.queued and _is_suspended(view):
        # Still said to be suspended, so that the end of this attempt is known for what it is.
        return Step(conditions.suspended("Resuming", "waiting for the pods to stop; the next attempt follows"))
    if child.finished and not any(pod.running for pod in pods):
        return Step(conditions.waiting("Stopping", f"Job {child.name} is over; reading its result"), check_again=(1.0,))
    if sum(pod.running or bool(pod.exit and not pod.disruption) for pod in pods) < nodes:
        notice = waiting.explain(observed, child, pods, nodes)
        return Step(conditions.waiting(notice.reason, notice.message), check_again=(_pending_left(view),))
    stalled_at = progress.stall_deadline(view.progress, attempt.started_at, view.settings.stalled_seconds)
    said = progress.training(observed.report, stalled_at, view.now)
    phase = said.reason if said.reason == progress.STALLED or not observed.report else observed.report.stage
    until_stalled = (stalled_at - view.now).total_seconds() if stalled_at else None
    return Step(conditions.running(phase, said), check_again=(_active_left(view), until_stalled))


def _back_off(view: View, retry: failure.Retry) -> Step:
    at = retry.at.isoformat(timespec="seconds").replace("+00:00", "Z")
    last = f": {view.last.message}" if view.last and view.last.message else ""
    message = f"attempt {attempts.next_number(view.history, view.observed)} starts at {at}, after {retry.after}{last}"
    left = (retry.at - view.now).total_seconds()
    return Step(conditions.waiting("BackingOff", message), delete=view.unfinished, check_again=(left,))


def _start(view: View) -> Step:
    """Begin the next attempt, once nothing of an earlier one can still write."""
    observed = view.observed
    if view.unfinished:
        scene = conditions.waiting("Stopping", f"waiting for Job {view.unfinished[0].name} to be gone")
        return Step(scene, delete=tuple(child for child in view.unfinished if not child.deleting))
    if observed.strays:
        message = f"waiting for pod {observed.strays[0]} of an earlier job of this name to end"
        return Step(conditions.waiting("Stopping", message), check_again=(_pending_left(view),))
    if observed.obstacle:
        scene = conditions.waiting(observed.obstacle.reason, observed.obstacle.message)
        return Step(scene, check_again=(_pending_left(view),))
    number, micro = attempts.next_number(view.history, observed), failure.micro_batch(view.history, view.spec)
    name = attempts.job_name(observed.job, number)
    queued = names.LABEL_KUEUE_QUEUE in observed.job.queue_labels
    reason, message = ("Queued", "waiting for Kueue to admit it") if queued else ("Pending", "")
    return Step(
        conditions.waiting(reason, message or waiting.starting(name, view.spec.resources.nodes)),
        create=tuple(children.build(observed.job, view.spec, number, micro, view.settings)),
        starts=Attempt(job_name=name, started_at=view.now, micro_batch_size=micro),
        check_again=(view.spec.pending_deadline_seconds,),
    )


def _late(view: View) -> Scene | None:
    """A deadline that has passed."""
    active, pending = _active_left(view), _pending_left(view)
    if active is not None and active <= 0:
        limit = view.spec.active_deadline_seconds
        return conditions.failed(deadlines.ACTIVE, f"its attempts ran longer than activeDeadlineSeconds ({limit} s)")
    if pending is not None and pending <= 0:
        why = statuses.condition(view.status, "Scheduled")
        tail = f"; it waited for: {why.reason}: {why.message}" if why and why.status == "False" else ""
        limit = view.spec.pending_deadline_seconds
        return conditions.failed(deadlines.PENDING, f"not running after pendingDeadlineSeconds ({limit} s){tail}")
    return None


def _has_started(view: View) -> bool:
    return view.live is not None and any(pod.started_at for pod in attempts.pods_of(view.observed, view.live.job_name))


def _active_left(view: View) -> float | None:
    return deadlines.active_left(view.spec, view.history, _has_started(view), view.now)


def _pending_left(view: View) -> float | None:
    if view.spec.suspend or _has_started(view) or (view.status.progress is not None):
        return None
    return deadlines.pending_left(
        view.spec, deadlines.pending_since(view.observed.job, view.status, view.history), view.now
    )


def _is_suspended(view: View) -> bool:
    known = statuses.condition(view.status, "Suspended")
    return known is not None and known.status == "True"
