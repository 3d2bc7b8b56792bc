"""Which pod of a failed attempt explains it: when one rank fails, all others follow."""

from collections.abc import Sequence
from datetime import UTC, datetime
from enum import IntEnum

from finetune_api.exit_codes import OUTCOMES, REASONS, ExitCode, outcome_of
from finetune_operator.core.attempts.last_words import final_report
from finetune_operator.core.objects.pod import Pod

PREEMPTED = OUTCOMES[ExitCode.PREEMPTED].reason
OOM_KILLED = REASONS["OOMKilled"].reason
STORAGE_EXCEEDED = REASONS["StorageLimitExceeded"].reason
GPU_UNAVAILABLE = OUTCOMES[ExitCode.GPU_UNAVAILABLE].reason
DEADLINE = "JobDeadlineExceeded"

_KNOWN = frozenset({outcome.reason for outcome in REASONS.values() if outcome.code})
#: Exit codes of a signal. After a report they only say that the trainer took too long to leave.
SIGNALS = (137, 143)
#: Exit codes that a kill from outside may have, where no report says otherwise.
_KILLED = (1, *SIGNALS)
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


class Weight(IntEnum):
    """How much the end of a pod explains; the least explains most, of equals the earliest."""

    NAMED = 0
    """The trainer, the kernel or the kubelet says what went wrong."""
    DISRUPTED = 1
    """It was evicted, or its node is lost."""
    FAILED = 2
    """It crashed, was killed or was deleted."""
    STOPPED = 3
    """It was asked to stop, and saved."""
    FOLLOWED = 4
    """The Job controller stopped it, because another pod had failed."""


def find(pods: Sequence[Pod]) -> Pod | None:
    """Return the pod that explains the failure; None where none has failed."""
    failed = [pod for pod in pods if has_failed(pod)]
    return min(failed, key=lambda pod: (weigh(pod, failed), _ended_at(pod), pod.index, pod.uid), default=None)


def has_failed(pod: Pod) -> bool:
    """Return whether the pod's trainer failed, or will never end by itself."""
    if pod.exit:
        return bool(pod.exit.code)
    return bool(pod.disruption) or (not pod.live and bool(named_reason(pod)))


def weigh(pod: Pod, failed: Sequence[Pod]) -> Weight:
    """Return how much the end of `pod` explains, which is one of `failed`."""
    if is_named(pod):
        return Weight.NAMED
    if pod.disruption:
        return Weight.DISRUPTED
    if _follows_another(pod, failed):
        return Weight.FOLLOWED
    return Weight.STOPPED if named_reason(pod) == PREEMPTED else Weight.FAILED


def is_named(pod: Pod) -> bool:
    """Return whether the pod's end has a reason that is its own: neither a kill nor a request to stop."""
    return named_reason(pod) not in ("", PREEMPTED) and not is_killed(pod)


def was_told_to_stop(pod: Pod) -> bool:
    """Return whether the pod was deleted before it ended."""
    return pod.deleted_at is not None and (pod.exit is None or pod.deleted_at <= _ended_at(pod))


def failed_before_training(pods: Sequence[Pod]) -> Pod | None:
    """Return the pod whose trainer never started, because its init container failed; a stopped one comes last."""
    failed = [pod for pod in pods if pod.init and pod.init.exit and pod.init.exit.code]
    return min(failed, key=was_stopped_before_training, default=None)


def was_stopped_before_training(pod: Pod) -> bool:
    """Return whether the pod's init container ended because the pod was deleted."""
    return was_told_to_stop(pod) and bool(pod.init and pod.init.exit and pod.init.exit.code in SIGNALS)


def _follows_another(pod: Pod, failed: Sequence[Pod]) -> bool:
    """Return whether `pod` was told to stop when another pod had already ended."""
    told = pod.deleted_at
    if told is None or not was_told_to_stop(pod):
        return False
    return any(other is not pod and _LONG_AGO < _ended_at(other) <= told for other in failed)


def _ended_at(pod: Pod) -> datetime:
    return (pod.exit.finished_at if pod.exit else None) or pod.disrupted_at or _LONG_AGO


def named_reason(pod: Pod) -> str:
    """Return the reason that the pod itself tells, or empty. torchrun hides the exit code, so the report counts too."""
    if pod.exit and pod.exit.reason == OOM_KILLED:
        return OOM_KILLED
    if _used_too_much(pod):
        return STORAGE_EXCEEDED
    if _got_no_device(pod):
        return GPU_UNAVAILABLE
    if pod.reason == "DeadlineExceeded":
        return DEADLINE
    if pod.exit is None or not pod.exit.code:
        return ""
    report = final_report(pod)
    reported = (report.reason or "") if report and report.reason != OOM_KILLED else ""
    if pod.exit.code in SIGNALS and reported:
        return reported if reported in _KNOWN else ""
    outcome = outcome_of(pod.exit.code, reported)
    return outcome.reason if outcome else reported if reported in _KNOWN else ""


def _used_too_much(pod: Pod) -> bool:
    """Return whether the kubelet ended the pod for what it used itself: not for its node's lack, nor before it ran."""
    return pod.reason == "Evicted" and not pod.disruption and "exceed" in pod.message


def _got_no_device(pod: Pod) -> bool:
    """Return whether the kubelet rejected the pod, because a device plugin offers fewer working devices than it did."""
    is_plugin = pod.reason == "UnexpectedAdmissionError" and "device" in pod.message
    return pod.exit is None and (is_plugin or (pod.reason.startswith("OutOf") and "/" in pod.reason))


def is_killed(pod: Pod) -> bool:
    """Return whether the pod's end says no more than that somebody or something killed it."""
    told = named_reason(pod) in (OOM_KILLED, STORAGE_EXCEEDED, DEADLINE)
    return pod.exit is not None and pod.exit.code in _KILLED and not told and not final_report(pod)
