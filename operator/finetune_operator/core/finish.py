"""Complete a step to a plan: status, clean-up, events and requeue time."""

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from finetune_api import constants, plain_text
from finetune_api.status import FineTuneJobStatus, Progress
from finetune_operator.core.attempts import failure, history, progress, usage
from finetune_operator.core.objects import raw, status_io
from finetune_operator.core.objects.observed import Child, Observed
from finetune_operator.core.status import (
    conditions,
    deadlines,
    events,
    training,
    trial_rows,
)
from finetune_operator.core.types import (
    Plan,
    Step,
    Target,
    View,
)


def plan_cleanup(observed: Observed, status: FineTuneJobStatus, now: datetime) -> Plan:
    """Return the plan of a finished job: stop its Jobs, and delete it (never the adapter) after its TTL."""
    left = _ttl_left(observed, status, now)
    if left is not None and left <= 0:
        return Plan(delete=(Target(constants.KIND, observed.job.name, observed.job.uid),))
    return Plan(delete=_targets(_stoppable(observed)), requeue_after=left)


def _ttl_left(observed: Observed, status: FineTuneJobStatus, now: datetime) -> float | None:
    ttl = raw.at(json.loads(observed.job.spec), "ttlSecondsAfterFinished")
    return deadlines.ttl_left(ttl if isinstance(ttl, int) else None, status, now)


def build_plan(
    observed: Observed, status: FineTuneJobStatus, step: Step, now: datetime, view: View | None = None
) -> Plan:
    """Return the plan that follows from a step.

    Args:
        observed: The job and its children.
        status: The recorded status.
        step: The next step.
        now: The time, in whole seconds.
        view: The job's attempts; None for a rejected job.
    """
    new = _new_status(observed, status, step, now, view)
    # Messages of pods, trainers and events end up in terminals: this is where all of them enter the status.
    written = plain_text.plain_values(found := new.manifest())
    if written != found:
        new = FineTuneJobStatus.model_validate(written)
    patch = status_io.merge_patch(json.loads(observed.job.status), written)
    over = status_io.is_terminal(new)
    again = [seconds for seconds in step.recheck_after if seconds is not None and seconds > 0]
    return Plan(
        create=step.create,
        status=patch or None,
        suspend=_targets(step.suspend),
        delete=_targets(_stoppable(observed) if over else _no_longer_needed(observed, step)),
        events=tuple(events.between(status, new)),
        requeue_after=_ttl_left(observed, new, now) if over else min(again, default=None),
    )


def _new_status(
    observed: Observed, status: FineTuneJobStatus, step: Step, now: datetime, view: View | None
) -> FineTuneJobStatus:
    generation = observed.job.generation
    written = conditions.write(step.state, status.conditions, generation, now)
    changed: dict[str, Any] = {"phase": step.state.phase, "observed_generation": generation, "conditions": written}
    if view is not None:
        attempts = [*view.history, *([step.new_attempt] if step.new_attempt else [])]
        changed |= {"attempts": attempts, "progress": _shown_progress(view, step)}
        changed["earlier_attempts"] = view.earlier
        if attempts and status.start_time is None:
            changed["start_time"] = attempts[0].started_at or now
        if view.spec.pack:
            changed["trials"] = trial_rows.merge(status.trials, view.report, view.spec.pack)
        if view.report and view.report.execution_plan:
            changed["execution_plan"] = view.report.execution_plan
        if view.ending and view.ending.report:
            changed |= {"metrics": view.ending.report.metrics or status.metrics}
            if view.ending.reason in failure.ENDED_WELL:
                changed |= {"gate": view.ending.report.gate}
            if view.ending.reason == failure.SUCCEEDED:
                changed |= {"adapter": view.ending.report.adapter, "artifacts": view.ending.report.artifacts}
            if view.ending.reason == failure.GATE_NOT_PASSED:
                changed |= {"candidate": view.ending.report.candidate}
    new = status.model_copy(update=changed)
    if status_io.is_terminal(new):
        new = _final_status(observed, new, step, now)
    return new.model_copy(update={"usage": usage.update(status, new, view.spec, view.settings)}) if view else new


def _shown_progress(view: View, step: Step) -> Progress | None:
    """Return the progress; pace and estimated end only while the trainer makes progress."""
    stands = step.state.training.reason in (training.STALLED, training.NOT_ANSWERING)
    is_training = step.state.scheduled.status == "True" and not stands
    is_over = step.state.succeeded.status != "Unknown"
    return view.progress if is_training or is_over else progress.paused(view.progress)


def _final_status(observed: Observed, status: FineTuneJobStatus, step: Step, now: datetime) -> FineTuneJobStatus:
    """Return the final status: no estimated end, and an attempt that still runs ends with the job."""
    ending = failure.Ending(step.state.succeeded.reason, step.state.succeeded.message, finished_at=now)
    closed = [each if each.reason else history.close(each, observed, ending, now) for each in status.attempts]
    final = progress.finished(status.progress, step.state.succeeded.status == "True")
    changed = {"completion_time": now, "progress": final, "attempts": closed, "trials": trial_rows.end(status.trials)}
    return status.model_copy(update=changed)


def _stoppable(observed: Observed) -> tuple[Child, ...]:
    found = (*observed.children, *observed.strangers)
    return tuple(child for child in found if not child.finished and not child.deleting)


def _no_longer_needed(observed: Observed, step: Step) -> tuple[Child, ...]:
    strangers = (child for child in observed.strangers if not child.deleting)
    return (*step.delete, *_old_children(observed, step), *strangers)


def _old_children(observed: Observed, step: Step) -> tuple[Child, ...]:
    """Return old finished Jobs: a job preempted a hundred times must not keep a hundred Jobs and pods."""
    done = sorted((c for c in observed.children if c.finished and not c.deleting), key=lambda c: c.attempt)
    return tuple(done[: -history.KEPT_NOT_COUNTED]) if step.new_attempt else ()


def _targets(found: Sequence[Child]) -> tuple[Target, ...]:
    return tuple(Target("Job", child.name, child.uid) for child in found)
