"""One ended attempt -> why it ended."""

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
OOM_KILLED = REASONS["OOMKilled"].reason
NODE_LOST = "NodeLost"
SUSPENDED = "Suspended"
JOB_DELETED = "JobDeleted"
SPEC_CHANGED = "SpecChanged"
POD_LOST = "PodLost"
REPORT_LOST = "ReportLost"
CRASHED = "TrainerCrashed"

FINAL = frozenset(outcome.reason for outcome in REASONS.values() if outcome.code and outcome.final)
#: Endings that are nobody's mistake: they do not count toward recovery.maxAttempts.
NOT_COUNTED_AS_FAILURE = frozenset({PREEMPTED, NODE_LOST, SUSPENDED, SPEC_CHANGED})
_KNOWN = frozenset(outcome.reason for outcome in REASONS.values() if outcome.code)
#: Killed from outside: such an exit says nothing when the pod was disrupted anyway.
_KILLED = (1, 137, 143)
_TAIL_LINES, _TAIL_LENGTH = 3, 600
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. `report` is the trainer's last word, where it left one."""

    reason: str
    message: str
    exit_code: int | None = None
    finished_at: datetime | None = None
    report: TrainerReport | None = None


def final_report(pod: Pod) -> TrainerReport | None:
    """The report in the pod's termination message; None where there is none or it cannot be read.

    The kubelet puts log lines there when the trainer left nothing, and those are JSON as well; a last word is one.
    """
    if pod.exit is None or not pod.exit.message.lstrip().startswith("{"):
        return None
    try:
        report = TrainerReport.model_validate_json(pod.exit.message)
    except ValidationError:
        return None
    return report if report.stage in ("Succeeded", "Failed") else None


def classify_exit(child: Child, pods: Sequence[Pod], memory_limit: str = "") -> Ending:
    """Why the finished Job `child` ended. `pods` are the last of each rank (pods.current), for an earlier one was
    replaced and explains nothing. `memory_limit` is resources.memory as the user wrote it.
    """
    if child.finished == "Complete":
        return _completed(child, pods)
    blamed = _root_cause_pod(pods)
    disrupted = next((pod for pod in pods if pod.disruption), None)
    is_lost = disrupted is not None or "DisruptionTarget" in child.message
    if blamed is None or (is_lost and not _explains_failure(blamed)) or (blamed.deleting and _is_killed(blamed)):
        return _lost(child, disrupted, blamed)
    return _failed(child, blamed, memory_limit)


def _completed(child: Child, pods: Sequence[Pod]) -> Ending:
    for pod in pods:
        report = final_report(pod) if pod.index == 0 and pod.exit and pod.exit.code == 0 else None
        if report and report.adapter:
            return Ending(SUCCEEDED, report.message or "the adapter is published", 0, child.finished_at, report)
    # The store is the witness: the next attempt finds this job's own manifest, verifies it and reports again.
    return Ending(REPORT_LOST, "the trainer ended well, but its report is gone with its pod", 0, child.finished_at)


def _root_cause_pod(pods: Sequence[Pod]) -> Pod | None:
    """The pod that failed first and knows why: when one rank fails, the others fail for the lack of it."""
    failed = [pod for pod in pods if pod.exit and pod.exit.code]
    return min(failed, key=lambda pod: (not _explains_failure(pod), _ended_at(pod), pod.index), default=None)


def _explains_failure(pod: Pod) -> bool:
    return bool(_reason(pod)) and not _is_killed(pod)


def _ended_at(pod: Pod) -> datetime:
    return (pod.exit.finished_at if pod.exit else None) or _LONG_AGO


def _reason(pod: Pod) -> str:
    """The named outcome of a pod, or empty. torchrun hides the exit code, so the report is asked as well."""
    if pod.exit is None:
        return ""
    if pod.exit.reason == OOM_KILLED:
        return OOM_KILLED
    report = final_report(pod)
    said = report.reason if report and report.reason != OOM_KILLED else None
    outcome = outcome_of(pod.exit.code, said) if pod.exit.code else None
    if outcome:
        return outcome.reason
    return said if said and said in _KNOWN else ""


def _is_killed(pod: Pod) -> bool:
    return pod.exit is not None and pod.exit.code in _KILLED and pod.exit.reason != OOM_KILLED and not final_report(pod)


def _lost(child: Child, disrupted: Pod | None, blamed: Pod | None) -> Ending:
    """The pod, or the node under it, was taken away."""
    code = blamed.exit.code if blamed and blamed.exit else None
    if disrupted or "DisruptionTarget" in child.message:
        why = disrupted.disruption if disrupted else child.message
        return Ending(NODE_LOST, f"the pod was taken from its node: {why}", code, child.finished_at)
    if blamed:
        return Ending(PREEMPTED, "the pod was deleted before it could save a checkpoint", code, child.finished_at)
    why = child.message or child.reason or "its pod is gone"
    return Ending(POD_LOST, f"the Job failed and left no exit code: {why}", None, child.finished_at)


def _failed(child: Child, pod: Pod, memory_limit: str) -> Ending:
    assert pod.exit is not None
    report, reason = final_report(pod), _reason(pod)
    message = report.message if report and report.message else _explain(pod, reason, memory_limit)
    ended = pod.exit.finished_at or child.finished_at
    return Ending(reason or CRASHED, message, pod.exit.code, ended, report)


def _explain(pod: Pod, reason: str, memory_limit: str) -> str:
    """A sentence for a trainer that left none, with the last lines of its log."""
    exit_ = pod.exit
    assert exit_ is not None
    said = f"\n{lines}" if (lines := _last_lines(exit_.message)) else ""
    if reason == OOM_KILLED:
        limit = f"its limit of {memory_limit} (resources.memory)" if memory_limit else "what the node could give"
        return f"the kernel ended the container: its host memory reached {limit}{said}"
    if reason:
        return f"{REASONS[reason].cause} {REASONS[reason].cure}{said}"
    return f"the trainer in pod {pod.name} ended with exit code {exit_.code} and no report{said}"


def _last_lines(message: str) -> str:
    """The end of a log; of lines that are JSON, what they say."""
    lines = [line for line in map(_log_text, message.strip().splitlines()) if line]
    return "\n".join(lines[-_TAIL_LINES:])[-_TAIL_LENGTH:]


def _log_text(line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError:
        return line.strip()
    return (raw.text(found, "event") or raw.text(found, "message") or line).strip()
