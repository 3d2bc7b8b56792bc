"""Classify why an attempt ended."""

from collections.abc import Sequence, Set
from dataclasses import dataclass
from datetime import datetime

from finetune_api import exit_codes
from finetune_api.exit_codes import OUTCOMES, REASONS, ExitCode
from finetune_api.status import Adapter, TrainerReport
from finetune_operator.core.attempts import root_cause
from finetune_operator.core.attempts.last_words import final_report, last_lines
from finetune_operator.core.attempts.root_cause import OOM_KILLED, PREEMPTED, STORAGE_EXCEEDED
from finetune_operator.core.objects.observed import Child
from finetune_operator.core.objects.pod import Pod

SUCCEEDED = OUTCOMES[ExitCode.SUCCEEDED].reason
OUT_OF_MEMORY = OUTCOMES[ExitCode.GPU_OUT_OF_MEMORY].reason
GPU_UNAVAILABLE = root_cause.GPU_UNAVAILABLE
GATE_NOT_PASSED = exit_codes.GATE_NOT_PASSED
#: Reasons of attempts whose trainer did all of its work; there is never another one after them.
ENDED_WELL = (SUCCEEDED, GATE_NOT_PASSED)
NODE_LOST = "NodeLost"
SUSPENDED = "Suspended"
JOB_DELETED = "JobDeleted"
SPEC_CHANGED = "SpecChanged"
JOB_REFUSED = "JobRefused"
POD_LOST = "PodLost"
JOB_DEADLINE = root_cause.DEADLINE
INIT_FAILED = "InitContainerFailed"
REPORT_LOST = "ReportLost"
CRASHED = "TrainerCrashed"

FINAL = frozenset(outcome.reason for outcome in REASONS.values() if outcome.code and outcome.final)
#: Reasons that are not the job's fault: they do not count toward recovery.maxAttempts.
NOT_COUNTED_AS_FAILURE = frozenset({PREEMPTED, NODE_LOST, SUSPENDED, SPEC_CHANGED, JOB_REFUSED})


DEADLINE_CURE = (
    "This operator sets no such deadline: an admission policy or a webhook has. Except these Jobs from it, or save"
    " checkpoints more often than it strikes"
)


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


@dataclass(frozen=True)
class Places:
    """Where a job's adapters may lie: `outputs` if published, `candidates` if they did not meet publish.onlyIf."""

    outputs: Set[str]
    candidates: Set[str]


def classify_exit(child: Child, pods: Sequence[Pod], places: Places, memory_limit: str = "") -> Ending:
    """Return why an attempt ended: its Job has, or the trainers of its pods have.

    Args:
        child: The Job.
        pods: The last pod of each rank (pod_set.current): earlier ones were replaced and explain nothing.
        places: Where the adapter may lie.
        memory_limit: resources.memory as the user wrote it.
    """
    if success := _ended_well(child, pods, places):
        return success
    blamed = root_cause.find(pods)
    if child.finished == "Complete" or (blamed is None and any(pod.index == 0 and pod.exit for pod in pods)):
        # The store knows: the next attempt finds this job's own manifest, verifies it and reports again.
        message = f"Trainer exited 0 but {_why_unread(pods)}; a new attempt verifies the published adapter"
        return Ending(REPORT_LOST, message, 0, child.finished_at)
    if blamed and root_cause.is_named(blamed):
        return _failed(child, blamed, memory_limit)
    if child.reason == "DeadlineExceeded":
        return _job_deadline(child, pods, blamed)
    if "DisruptionTarget" in child.message or (blamed and blamed.disruption):
        why = (blamed.disruption if blamed else "") or child.message
        return Ending(NODE_LOST, f"pod evicted or its node lost: {why}", _code(blamed), child.finished_at)
    unstarted = root_cause.failed_before_training(pods)
    if unstarted and (blamed is None or root_cause.was_told_to_stop(blamed)):
        return _init_failed(child, unstarted)
    if blamed is None or _hides_another(child, pods, blamed):
        return _pod_lost(child, pods)
    if root_cause.was_told_to_stop(blamed) and root_cause.is_killed(blamed):
        message = "the pod was deleted before it could save a checkpoint"
        return Ending(PREEMPTED, message, _code(blamed), child.finished_at)
    return _failed(child, blamed, memory_limit)


def _ended_well(child: Child, pods: Sequence[Pod], places: Places) -> Ending | None:
    """Return the publication, or the candidate, that rank 0 reported. It stands, however all ended after it.

    Whoever gets at the pod can write a report, and users follow its URI: it can only be the job's own.
    """
    for pod in pods:
        report = final_report(pod) if pod.index == 0 else None
        if report is None or report.stage != SUCCEEDED:
            continue
        assert pod.exit is not None
        ended = child.finished_at or pod.exit.finished_at
        if _lies_at(report.adapter, places.outputs):
            return Ending(SUCCEEDED, report.message or "the adapter is published", pod.exit.code, ended, report)
        if _lies_at(report.candidate, places.candidates):
            why = report.message or "the adapter does not meet publish.onlyIf"
            return Ending(GATE_NOT_PASSED, why, pod.exit.code, ended, report)
    return None


def _lies_at(adapter: Adapter | None, uris: Set[str]) -> bool:
    return adapter is not None and adapter.uri.rstrip("/") in {uri.rstrip("/") for uri in uris}


def _why_unread(pods: Sequence[Pod]) -> str:
    found = next((report for pod in pods if pod.index == 0 and (report := final_report(pod))), None)
    if found and found.adapter:
        return f"reported an adapter at {found.adapter.uri}, which is not output.uri"
    if found and found.candidate:
        return f"reported a candidate at {found.candidate.uri}, which is not where this job keeps one"
    return "its report was lost"


def _code(pod: Pod | None) -> int | None:
    return pod.exit.code if pod and pod.exit else None


def _job_deadline(child: Child, pods: Sequence[Pod], blamed: Pod | None) -> Ending:
    """Return the ending of an attempt whose Job had a deadline, which this operator never sets."""
    report = next((found for pod in pods if pod.index == 0 and (found := final_report(pod))), None)
    tail = f"; the trainer: {report.message}" if report and report.message else ""
    message = f"Job {child.name}: {_told(child.reason, child.message)}. {DEADLINE_CURE}{tail}"
    return Ending(JOB_DEADLINE, message, _code(blamed), child.finished_at, report)


def _hides_another(child: Child, pods: Sequence[Pod], blamed: Pod) -> bool:
    """Return whether all pods that are known were told to stop: one of a rank that is gone must have failed first."""
    return child.finished == "Failed" and len(pods) < child.parallelism and root_cause.was_told_to_stop(blamed)


def _pod_lost(child: Child, pods: Sequence[Pod]) -> Ending:
    said = next((f"pod {pod.name}: {_told(pod.reason, pod.message)}" for pod in pods if pod.reason), "")
    gone = "the pod of a rank is gone, and the others were only told to stop: " if pods and not said else ""
    why = said or child.message or child.reason or "its pod is gone"
    return Ending(POD_LOST, f"Job failed without a container exit code: {gone}{why}", None, child.finished_at)


def _told(reason: str, message: str) -> str:
    """Return reason and message of a pod or Job as one phrase."""
    return ": ".join(part for part in (reason, message.strip().rstrip(".")) if part)


def _init_failed(child: Child, pod: Pod) -> Ending:
    """Return the ending of an attempt whose trainer never started, because an init container of its pod failed."""
    assert pod.init and pod.init.exit
    exit_ = pod.init.exit
    if root_cause.was_stopped_before_training(pod):
        message = f"the pod was deleted while its init container {pod.init.name} ran"
        return Ending(PREEMPTED, message, None, child.finished_at)
    tail = f"\n{lines}" if (lines := last_lines(exit_.message)) else ""
    why = f" ({exit_.reason})" if exit_.reason not in ("", "Error") else ""
    message = f"init container {pod.init.name} of pod {pod.name} ended with exit code {exit_.code}{why}{tail}"
    return Ending(INIT_FAILED, message, None, exit_.finished_at or child.finished_at, node=pod.node)


def _failed(child: Child, pod: Pod, memory_limit: str) -> Ending:
    report, reason = final_report(pod), root_cause.named_reason(pod)
    message = _explain(pod, reason, memory_limit, report.message if report else "")
    ended = (pod.exit.finished_at if pod.exit else None) or child.finished_at
    return Ending(reason or CRASHED, message, _code(pod), ended, report, pod.node)


def _explain(pod: Pod, reason: str, memory_limit: str, said: str) -> str:
    """Return a sentence: of the kernel or kubelet, else the trainer's own, else one with the last lines of its log."""
    log = last_lines(pod.exit.message) if pod.exit and not said else said
    tail = f"\n{log}" if log else ""
    if reason == OOM_KILLED:
        return f"the kernel ended the container: its host memory reached {_memory(pod, memory_limit)}{tail}"
    if reason == STORAGE_EXCEEDED:
        return f"pod {pod.name}: {_told(pod.reason, pod.message)}. {REASONS[reason].cure}{tail}"
    if reason == GPU_UNAVAILABLE and pod.exit is None:
        where = f"pod {pod.name} on node {pod.node or 'unknown'}"
        return f"{where}: {_told(pod.reason, pod.message)}. {REASONS[reason].cure}"
    if reason == JOB_DEADLINE:
        return f"pod {pod.name}: {_told(pod.reason, pod.message)}. {DEADLINE_CURE}{tail}"
    if said:
        return said
    if reason:
        return f"{REASONS[reason].cause} {REASONS[reason].cure}{tail}"
    return f"the trainer in pod {pod.name} ended with exit code {_code(pod)} and no report{tail}"


def _memory(pod: Pod, asked: str) -> str:
    """Return the limit that was reached, and who set it."""
    limit = pod.memory_limit or asked
    if not limit:
        return "what the node could give"
    if asked and limit == asked:
        return f"its limit of {limit} (resources.memory)"
    return f"its limit of {limit}, set by a LimitRange, a webhook or the administrator: set resources.memory"
