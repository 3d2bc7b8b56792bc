"""Classify why an attempt ended."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pydantic import ValidationError

from finetune_api.exit_codes import (
    OUTCOMES,
    REASONS,
    ExitCode,
    outcome_of,
)
from finetune_api.status import TrainerReport
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.observed import Child, Pod

SUCCEEDED = OUTCOMES[ExitCode.SUCCEEDED].reason
PREEMPTED = OUTCOMES[ExitCode.PREEMPTED].reason
OUT_OF_MEMORY = OUTCOMES[ExitCode.GPU_OUT_OF_MEMORY].reason
GPU_UNAVAILABLE = OUTCOMES[ExitCode.GPU_UNAVAILABLE].reason
OOM_KILLED = REASONS["OOMKilled"].reason
NODE_LOST = "NodeLost"
SUSPENDED = "Suspended"
JOB_DELETED = "JobDeleted"
SPEC_CHANGED = "SpecChanged"
POD_LOST = "PodLost"
INIT_FAILED = "InitContainerFailed"
REPORT_LOST = "ReportLost"
CRASHED = "TrainerCrashed"

FINAL = frozenset(outcome.reason for outcome in REASONS.values() if outcome.code and outcome.final)
#: Reasons that are not the job's fault: they do not count toward recovery.maxAttempts.
NOT_COUNTED_AS_FAILURE = frozenset({PREEMPTED, NODE_LOST, SUSPENDED, SPEC_CHANGED})
_KNOWN = frozenset(outcome.reason for outcome in REASONS.values() if outcome.code)
#: Exit codes of a kill from outside: they explain nothing when the pod was disrupted anyway.
_KILLED = (1, 137, 143)
_TAIL_LINES, _TAIL_LENGTH = 3, 600
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. `report` is the trainer's final report, where it left one."""

    reason: str
    message: str
    exit_code: int | None = None
    finished_at: datetime | None = None
    report: TrainerReport | None = None
    node: str = ""
    """Node of the pod that explains it."""


def final_report(pod: Pod) -> TrainerReport | None:
    """Return the report in the pod's termination message; None where there is none that can be read.

    When the trainer left no message, the kubelet puts log lines there. Those are JSON too, but only a final report has
    a final stage.
    """
    if pod.exit is None or not pod.exit.message.lstrip().startswith("{"):
        return None
    try:
        report = TrainerReport.model_validate_json(pod.exit.message)
    except ValidationError:
        return None
    return report if report.stage in ("Succeeded", "Failed") else None


def classify_exit(child: Child, pods: Sequence[Pod], memory_limit: str = "") -> Ending:
    """Return why a finished Job ended.

    Args:
        child: The finished Job.
        pods: The last pod of each rank (pod_set.current): earlier ones were replaced and explain nothing.
        memory_limit: resources.memory as the user wrote it.
    """
    if child.finished == "Complete":
        return _completed(child, pods)
    blamed = _root_cause_pod(pods)
    disrupted = next((pod for pod in pods if pod.disruption), None)
    is_lost = disrupted is not None or "DisruptionTarget" in child.message
    unstarted = next((pod for pod in pods if pod.init and pod.init.exit and pod.init.exit.code), None)
    if blamed is None and unstarted and not is_lost:
        return _init_failed(child, unstarted)
    if blamed is None or (is_lost and not _explains_failure(blamed)) or (blamed.deleting and _is_killed(blamed)):
        return _lost(child, disrupted, blamed)
    return _failed(child, blamed, memory_limit)


def _completed(child: Child, pods: Sequence[Pod]) -> Ending:
    for pod in pods:
        report = final_report(pod) if pod.index == 0 and pod.exit and pod.exit.code == 0 else None
        if report and report.adapter:
            return Ending(SUCCEEDED, report.message or "the adapter is published", 0, child.finished_at, report)
    # The store knows: the next attempt finds this job's own manifest, verifies it and reports again.
    return Ending(
        REPORT_LOST,
        "Trainer exited 0 but its report was lost; a new attempt verifies the published adapter",
        0,
        child.finished_at,
    )


def _root_cause_pod(pods: Sequence[Pod]) -> Pod | None:
    """Return the pod that failed first, those with a reason before others: when one rank fails, all others follow."""
    failed = [pod for pod in pods if pod.exit and pod.exit.code]
    return min(failed, key=lambda pod: (not _explains_failure(pod), _ended_at(pod), pod.index), default=None)


def _explains_failure(pod: Pod) -> bool:
    return bool(_reason(pod)) and not _is_killed(pod)


def _ended_at(pod: Pod) -> datetime:
    return (pod.exit.finished_at if pod.exit else None) or _LONG_AGO


def _reason(pod: Pod) -> str:
    """Return the named outcome of a pod, or empty. torchrun hides the exit code, so the report counts too."""
    if pod.exit is None:
        return ""
    if pod.exit.reason == OOM_KILLED:
        return OOM_KILLED
    report = final_report(pod)
    reported = report.reason if report and report.reason != OOM_KILLED else None
    outcome = outcome_of(pod.exit.code, reported) if pod.exit.code else None
    if outcome:
        return outcome.reason
    return reported if reported and reported in _KNOWN else ""


def _is_killed(pod: Pod) -> bool:
    return pod.exit is not None and pod.exit.code in _KILLED and pod.exit.reason != OOM_KILLED and not final_report(pod)


def _lost(child: Child, disrupted: Pod | None, blamed: Pod | None) -> Ending:
    """Return the ending of an attempt whose pod or node is gone."""
    code = blamed.exit.code if blamed and blamed.exit else None
    if disrupted or "DisruptionTarget" in child.message:
        why = disrupted.disruption if disrupted else child.message
        return Ending(NODE_LOST, f"pod evicted or its node lost: {why}", code, child.finished_at)
    if blamed:
        return Ending(PREEMPTED, "the pod was deleted before it could save a checkpoint", code, child.finished_at)
    why = child.message or child.reason or "its pod is gone"
    return Ending(POD_LOST, f"Job failed without a container exit code: {why}", None, child.finished_at)


def _init_failed(child: Child, pod: Pod) -> Ending:
    """Return the ending of an attempt whose trainer never started, because an init container of its pod failed."""
    assert pod.init and pod.init.exit
    exit_ = pod.init.exit
    tail = f"\n{lines}" if (lines := _last_lines(exit_.message)) else ""
    why = f" ({exit_.reason})" if exit_.reason not in ("", "Error") else ""
    message = f"init container {pod.init.name} of pod {pod.name} ended with exit code {exit_.code}{why}{tail}"
    return Ending(INIT_FAILED, message, None, exit_.finished_at or child.finished_at, node=pod.node)


def _failed(child: Child, pod: Pod, memory_limit: str) -> Ending:
    assert pod.exit is not None
    report, reason = final_report(pod), _reason(pod)
    message = report.message if report and report.message else _explain(pod, reason, memory_limit)
    ended = pod.exit.finished_at or child.finished_at
    return Ending(reason or CRASHED, message, pod.exit.code, ended, report, pod.node)


def _explain(pod: Pod, reason: str, memory_limit: str) -> str:
    """Return a sentence for a trainer that left none, with the last lines of its log."""
    exit_ = pod.exit
    assert exit_ is not None
    tail = f"\n{lines}" if (lines := _last_lines(exit_.message)) else ""
    if reason == OOM_KILLED:
        limit = f"its limit of {memory_limit} (resources.memory)" if memory_limit else "what the node could give"
        return f"the kernel ended the container: its host memory reached {limit}{tail}"
    if reason:
        return f"{REASONS[reason].cause} {REASONS[reason].cure}{tail}"
    return f"the trainer in pod {pod.name} ended with exit code {exit_.code} and no report{tail}"


def _last_lines(message: str) -> str:
    """Return the end of a log; lines of JSON are reduced to their message."""
    lines = [line for line in map(_log_text, message.strip().splitlines()) if line]
    return "\n".join(lines[-_TAIL_LINES:])[-_TAIL_LENGTH:]


def _log_text(line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError:
        return line.strip()
    return (raw.text(found, "event") or raw.text(found, "message") or line).strip()
