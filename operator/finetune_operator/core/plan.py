"""The life cycle of a FineTuneJob: decide what to do from what is observed. Pure and idempotent."""

from dataclasses import replace
from datetime import datetime

from finetune_api import constants
from finetune_api.status import Attempt
from finetune_operator.core import (
    finish,
    ownership,
    policy,
)
from finetune_operator.core.attempts import (
    failure,
    history,
    pod_set,
    progress,
    retry,
    usage,
)
from finetune_operator.core.attempts.retry import Retry, Stop
from finetune_operator.core.builders import job
from finetune_operator.core.objects import status_io
from finetune_operator.core.objects.observed import Child, Observed
from finetune_operator.core.objects.pod import Pod
from finetune_operator.core.status import (
    conditions,
    deadlines,
    training,
    wait_reason,
)
from finetune_operator.core.status.conditions import JobConditions
from finetune_operator.core.types import Plan, Step, View
from finetune_operator.settings import Settings

#: Check the pods of a finished Job this often while one of them is said to run.
POD_REFRESH_SECONDS = 10.0
#: Check this often whether the job that holds an output is over.
OUTPUT_RECHECK_SECONDS = 10.0


def plan(observed: Observed, settings: Settings, now: datetime) -> Plan:
    """Return what the job needs now. `now` has a time zone; statuses hold whole seconds, so its fraction is dropped."""
    now = now.replace(microsecond=0)
    status = status_io.read(observed.job.status)
    if observed.job.deleting:
        return Plan()
    if status_io.is_terminal(status):
        return finish.plan_cleanup(observed, status, now)
    spec = policy.read_spec(observed.job)
    if isinstance(spec, policy.Rejection):
        return finish.build_plan(observed, status, Step(conditions.rejected(spec.reason, spec.message)), now)
    observed, attempts = ownership.settle(observed, status, spec, settings, now)
    merged = progress.merge(status.progress, attempts.report, now)
    view = View(
        observed,
        status,
        spec,
        attempts.history,
        attempts.ending,
        attempts.report,
        merged,
        settings,
        now,
        attempts.earlier,
    )
    step = _step(view)
    made = finish.build_plan(observed, status, step, now, view)
    if (attempts.needs_look or step.needs_look) and not observed.looked_up:
        new = [step.new_attempt] if step.new_attempt else []
        return replace(made, look_up=tuple(history.job_names(observed.job, [*view.history, *new])))
    return made


def _step(view: View) -> Step:
    """Return the next step: the life cycle, from the end to the beginning."""
    after: Retry | None = None
    if view.last and not view.live:
        if view.last.reason == failure.SUCCEEDED:
            return Step(conditions.succeeded(view.spec.output.uri, view.last.message or ""))
        if view.last.reason == failure.GATE_NOT_PASSED:
            return Step(conditions.kept_back(view.last.message or ""))
        decision = retry.decide_retry(view.history, view.spec, view.observed.job.uid)
        if isinstance(decision, Stop):
            return Step(conditions.failed(decision.reason, decision.message))
        after = decision
    # No Job is ever built past this: a spec may change until its first attempt is recorded, and the rules at any time.
    if not view.live and (refusal := policy.check_policy(view.observed.job, view.spec, view.settings)):
        return Step(conditions.rejected(refusal.reason, refusal.message))
    if late := _missed_deadline(view, after):
        return Step(late)
    if view.live and history.is_superseded(view.live):
        return _replace_superseded(view, view.live)
    if view.spec.suspend:
        return _suspend(view)
    if view.live:
        return _monitor(view, view.live)
    if after and after.at > view.now:
        return _back_off(view, after)
    return _start(view, after)


def _replace_superseded(view: View, attempt: Attempt) -> Step:
    """Stop an attempt that runs an outdated spec; the next one runs the job's."""
    message = f"waiting for Job {attempt.job_name} and its pods to be gone: {attempt.message}"
    return Step(conditions.waiting("Stopping", message), delete=tuple(c for c in view.unfinished if not c.deleting))


def _suspend(view: View) -> Step:
    """Stop the running attempt; its trainer saves a checkpoint within the grace period."""
    if view.live is None:
        return Step(conditions.suspended("Suspended", "spec.suspend is true"), delete=view.unfinished)
    mine = _pods(view, view.live)
    lost = pod_set.unreachable(mine, view.now)
    message = wait_reason.unreachable(lost).message if lost else "waiting for the trainer to save a checkpoint and stop"
    # Kueue would unsuspend an admitted Job, so a queued one is deleted; its pods get the same grace period.
    ours = tuple(child for child in view.unfinished if not child.queued and not child.suspended)
    queued = tuple(child for child in view.unfinished if child.queued and not child.deleting)
    again = (_until(pod_set.unreachable_at(mine), view.now), _active_countdown(view))
    return Step(conditions.suspended("Suspending", message), suspend=ours, delete=queued, recheck_after=again)


def _monitor(view: View, attempt: Attempt) -> Step:
    """Report why the live attempt waits, or what it does."""
    if why := pod_set.released(view.observed, attempt.job_name):
        return Step(conditions.waiting("Stopping", why), delete=tuple(c for c in view.unfinished if not c.deleting))
    child, mine = history.child_of(view.observed, attempt.job_name), _pods(view, attempt)
    state, due = _attempt_conditions(view, attempt, child, mine)
    if state.scheduled.status == "True":
        state = replace(
            state, scheduled=conditions.pods_running(view.observed.unlabeled, ownership.remarks(view.observed))
        )
    again = (due, _pending_left(view), _active_countdown(view), _until(pod_set.unreachable_at(mine), view.now))
    if child is None or child.finished or not _has_hidden_pods(child, mine):
        return Step(state, recheck_after=again)
    is_new = child.created_at is None or (view.now - child.created_at).total_seconds() < POD_REFRESH_SECONDS
    return Step(state, recheck_after=(*again, POD_REFRESH_SECONDS), needs_look=not is_new)


def _has_hidden_pods(child: Child, pods: list[Pod]) -> bool:
    """Return whether a Job has more pods than are shown: their watch is behind, or they lack our label."""
    replaced = sum(bool(pod.exit) and (pod.deleting or bool(pod.disruption)) for pod in pods)
    return child.active + child.terminating > len(pods) - replaced


def _attempt_conditions(
    view: View, attempt: Attempt, child: Child | None, mine: list[Pod]
) -> tuple[JobConditions, float | None]:
    """Return the conditions of a live attempt, and the seconds after which to check again."""
    nodes = view.spec.resources.nodes
    if lost := pod_set.unreachable(mine, view.now):
        why = wait_reason.unreachable(lost)
        return conditions.waiting(why.reason, why.message), None
    if child is None or child.deleting:
        return conditions.waiting("Stopping", f"Job {attempt.job_name} is gone; waiting for its pods to end"), None
    if child.finished:
        if view.status.conditions and not history.is_settled(child, view.now):
            return conditions.recorded(view.status), 1.0  # the last events of its pods are on their way
        again = POD_REFRESH_SECONDS if any(pod.live for pod in mine) else 1.0
        return conditions.waiting("Stopping", f"Job {child.name} is over; reading its result"), again
    if child.suspended and not child.queued and _is_suspended(view):
        # Keep Suspended=True, so that the end of this attempt counts as a suspension.
        return conditions.suspended("Resuming", "waiting for the pods to stop; the next attempt follows"), None
    # A pod that was told to stop is about to be replaced: only one that ended by itself is done.
    done = sum(bool(pod.exit) and not pod.disruption and not pod.deleting for pod in mine)
    is_cut = child.parallelism < nodes and done < nodes  # Kubernetes stops its pods, which may take their grace period
    if child.suspended or is_cut or sum(pod.running for pod in mine) + done < nodes:
        why = wait_reason.explain(view.observed, child, mine, nodes, view.now)
        return conditions.waiting(why.reason, why.message), _until(wait_reason.tells_more_at(mine), view.now)
    held = _until(history.held_open_until(mine, nodes), view.now)
    if done == nodes and view.status.conditions and held is None:
        return conditions.recorded(view.status), None  # the Job's own condition follows in a moment
    if ended := next((pod.exit for pod in mine if pod.exit and pod.index == 0), None):
        stalled_at = training.stall_deadline(attempt, ended.finished_at, view.settings.stalled_seconds)
        value = training.finishing([name for pod in mine for name in pod.beside], stalled_at, view.now)
        return conditions.running(value.reason, value), held or _until(stalled_at, view.now)
    since, silent_since = pod_set.running_since(mine), view.observed.silent_since
    if not training.was_heard(attempt, since):
        silent_since = None  # it still starts
    elif view.report is None and silent_since is None:
        return conditions.recorded(view.status), None  # this operator has just started
    stalled_at = training.stall_deadline(attempt, since, view.settings.stalled_seconds)
    resumed = progress.resumption(attempt.resumed_from)
    value = training.training(view.report, stalled_at, silent_since, view.now, resumed)
    due = _until(stalled_at, view.now) if held is None else held
    return conditions.running(value.reason, value), due


def _back_off(view: View, retry: Retry) -> Step:
    at = retry.at.isoformat(timespec="seconds").replace("+00:00", "Z")
    last = f": {view.last.message}" if view.last and view.last.message else ""
    message = f"attempt {history.next_number(view.history, view.observed)} starts at {at}, after {retry.after}{last}"
    left = (retry.at - view.now).total_seconds()
    return Step(conditions.waiting("BackingOff", message), delete=view.unfinished, recheck_after=(left,))


def _start(view: View, after: Retry | None) -> Step:
    """Start the next attempt, once nothing of an earlier one can still write."""
    observed = view.observed
    if view.unfinished:
        state = conditions.waiting("Stopping", f"waiting for Job {view.unfinished[0].name} to be gone")
        return Step(state, delete=tuple(child for child in view.unfinished if not child.deleting))
    number, micro = history.next_number(view.history, observed), retry.next_micro_batch(view.history, view.spec)
    name, avoided = history.job_name(observed.job, number), retry.nodes_to_avoid(view.history)
    if stranger := next((each for each in observed.strangers if not each.finished or each.name == name), None):
        message = f"waiting for Job {stranger.name} to be gone, which this operator did not create"
        return Step(conditions.waiting("Stopping", message), recheck_after=(_pending_left(view, after),))
    if observed.foreign_children:
        message = f"waiting for {observed.foreign_children[0]} to end, which is another job's or nobody's: delete it"
        return Step(conditions.waiting("Stopping", message), recheck_after=(_pending_left(view, after),))
    if running := next((pod for pod in observed.pods if pod.live), None):
        state = conditions.waiting("Stopping", f"waiting for pod {running.name} of an earlier attempt to end")
        return Step(state, recheck_after=(_pending_left(view, after),))
    if observed.output_held_by and not view.history:
        why = wait_reason.output_in_use(view.spec.output.uri, observed.output_held_by)
        again = (OUTPUT_RECHECK_SECONDS, _pending_left(view, after))
        return Step(conditions.waiting(why.reason, why.message), recheck_after=again)
    if observed.create_blocked:
        state = conditions.waiting(observed.create_blocked.reason, observed.create_blocked.message)
        return Step(state, recheck_after=(_pending_left(view, after),))
    queued = constants.LABEL_KUEUE_QUEUE in observed.job.queue_labels
    reason, message = ("Queued", "waiting for Kueue to admit it") if queued else ("Pending", "")
    return Step(
        conditions.waiting(reason, message or wait_reason.starting(observed.job, name, view.spec.resources.nodes)),
        create=tuple(job.build(observed.job, view.spec, number, micro, view.settings, avoided)),
        new_attempt=Attempt(
            job_name=name,
            started_at=view.now,
            micro_batch_size=micro,
            gpu=usage.gpu_type(usage.required_gpu(view.spec, view.settings.node_selector), view.spec),
        ),
        recheck_after=(view.spec.pending_deadline_seconds,),
        needs_look=True,
    )


def _missed_deadline(view: View, after: Retry | None) -> JobConditions | None:
    """Return the conditions of a job that missed a deadline; None when it missed none."""
    active, pending = _active_left(view), _pending_left(view, after)
    if active is not None and active <= 0:
        limit = view.spec.active_deadline_seconds
        return conditions.failed(deadlines.ACTIVE, f"its attempts ran longer than activeDeadlineSeconds ({limit} s)")
    if pending is not None and pending <= 0:
        why = status_io.condition(view.status, "Scheduled")
        tail = f"; it waited for: {why.reason}: {why.message}" if why and why.status == "False" else ""
        limit = view.spec.pending_deadline_seconds
        return conditions.failed(deadlines.PENDING, f"not running after pendingDeadlineSeconds ({limit} s){tail}")
    return None


def _pods(view: View, attempt: Attempt) -> list[Pod]:
    return pod_set.current(history.pods_of(view.observed, attempt.job_name))


def _running_since(view: View) -> datetime | None:
    return pod_set.running_since(_pods(view, view.live)) if view.live else None


def _active_left(view: View) -> float | None:
    left = deadlines.active_left(view.spec, view.history, _running_since(view), view.now)
    return left - view.earlier.run_seconds if left is not None and view.earlier else left


def _active_countdown(view: View) -> float | None:
    """Return the seconds until the active deadline; None while nothing runs, because the time then stands."""
    return _active_left(view) if _running_since(view) else None


def _pending_left(view: View, after: Retry | None = None) -> float | None:
    """Return the seconds until the pending deadline. Neither a backoff nor a job that has run is pending."""
    has_started = view.live is not None and view.live.run_seconds is not None
    if view.spec.suspend or has_started or view.status.progress is not None or (after and after.at > view.now):
        return None
    since = deadlines.pending_since(view.observed.job, view.status, view.history, after.at if after else None)
    return deadlines.pending_left(view.spec, since, view.now)


def _until(moment: datetime | None, now: datetime) -> float | None:
    return (moment - now).total_seconds() if moment else None


def _is_suspended(view: View) -> bool:
    known = status_io.condition(view.status, "Suspended")
    return known is not None and known.status == "True"
