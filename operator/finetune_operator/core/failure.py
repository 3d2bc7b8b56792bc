"""One ended attempt -> why it ended (`judge`); all ended attempts -> try again, adapt or stop (`verdict`)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import ValidationError

from finetune_api import names
from finetune_api.names import OUTCOMES, ExitCode
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt, TrainerReport
from finetune_operator.core.observed import Child, Pod

SUCCEEDED = OUTCOMES[ExitCode.SUCCEEDED].reason
PREEMPTED = OUTCOMES[ExitCode.PREEMPTED].reason
OUT_OF_MEMORY = OUTCOMES[ExitCode.GPU_OUT_OF_MEMORY].reason
OOM_KILLED = OUTCOMES[ExitCode.OOM_KILLED].reason
NODE_LOST = "NodeLost"
SUSPENDED = "Suspended"
JOB_DELETED = "JobDeleted"
POD_LOST = "PodLost"
REPORT_LOST = "ReportLost"
CRASHED = "TrainerCrashed"

FINAL = frozenset(outcome.reason for code, outcome in OUTCOMES.items() if code and outcome.final)
#: Endings that are nobody's mistake: they do not count toward recovery.maxAttempts.
UNCOUNTED = frozenset({PREEMPTED, NODE_LOST, SUSPENDED})
MAX_BACKOFF_SECONDS = 600
_KNOWN = frozenset(outcome.reason for code, outcome in OUTCOMES.items() if code)
#: Killed from outside: such an exit says nothing when the pod was disrupted anyway.
_KILLED = (1, 137, 143)
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. `report` is the trainer's last word, where it left one."""

    reason: str
    message: str
    exit_code: int | None = None
    finished_at: datetime | None = None
    report: TrainerReport | None = None


def last_word(pod: Pod) -> TrainerReport | None:
    """The report in the pod's termination message; None where there is none or it cannot be read."""
    if pod.exit is None or not pod.exit.message.lstrip().startswith("{"):
        return None
    try:
        return TrainerReport.model_validate_json(pod.exit.message)
    except ValidationError:
        return None


def judge(child: Child, pods: Sequence[Pod], memory_limit: str = "") -> Ending:
    """Why the finished Job `child` ended. `memory_limit` is resources.memory as the user wrote it."""
    if child.finished == "Complete":
        return _completed(child, pods)
    blamed = _blamed(pods)
    # A disrupted pod of the same rank is the one that was replaced, and explains nothing.
    disrupted = next((p for p in pods if p.disruption and (blamed in (None, p) or p.index != blamed.index)), None)
    if blamed is None or (_is_killed(blamed) and (disrupted or blamed.deleting or "DisruptionTarget" in child.message)):
        return _lost(child, disrupted, blamed)
    return _failed(child, blamed, memory_limit)


def _completed(child: Child, pods: Sequence[Pod]) -> Ending:
    for pod in pods:
        report = last_word(pod) if pod.index == 0 and pod.exit and pod.exit.code == 0 else None
        if report and report.adapter:
            return Ending(SUCCEEDED, report.message or "the adapter is published", 0, child.finished_at, report)
    # The store is the witness: the next attempt finds this job's own manifest, verifies it and reports again.
    return Ending(REPORT_LOST, "the trainer ended well, but its report is gone with its pod", 0, child.finished_at)


def _blamed(pods: Sequence[Pod]) -> Pod | None:
    """The pod that failed first and knows why: when one rank fails, the others fail for the lack of it."""
    failed = [pod for pod in pods if pod.exit and pod.exit.code]
    return min(failed, key=lambda pod: (not _reason(pod), _ended_at(pod), pod.index), default=None)


def _ended_at(pod: Pod) -> datetime:
    return (pod.exit.finished_at if pod.exit else None) or _LONG_AGO


def _reason(pod: Pod) -> str:
    """The named outcome of a pod, or empty. torchrun hides the exit code, so the report is asked as well."""
    if pod.exit is None:
        return ""
    if pod.exit.reason == OOM_KILLED:
        return OOM_KILLED
    outcome = OUTCOMES.get(pod.exit.code)
    if outcome and pod.exit.code:
        return outcome.reason
    report = last_word(pod)
    return report.reason if report and report.reason in _KNOWN else ""


def _is_killed(pod: Pod) -> bool:
    return pod.exit is not None and pod.exit.code in _KILLED and pod.exit.reason != OOM_KILLED and not last_word(pod)


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
    report, reason = last_word(pod), _reason(pod)
    message = report.message if report and report.message else _explain(pod, reason, memory_limit)
    ended = pod.exit.finished_at or child.finished_at
    return Ending(reason or CRASHED, message, pod.exit.code, ended, report)


def _explain(pod: Pod, reason: str, memory_limit: str) -> str:
    """A sentence for a trainer that left none."""
    exit_ = pod.exit
    assert exit_ is not None
    if reason == OOM_KILLED:
        limit = f"its limit of {memory_limit} (resources.memory)" if memory_limit else "what the node could give"
        return f"the kernel ended the container: it used more memory than {limit}"
    if reason:
        outcome = next(o for o in OUTCOMES.values() if o.reason == reason)
        return f"{outcome.cause} {outcome.cure}"
    said = exit_.message.strip().splitlines()
    last = f": {said[-1][:500]}" if said else ""
    return f"the trainer in pod {pod.name} ended with exit code {exit_.code} and no report{last}"


@dataclass(frozen=True)
class Retry:
    """Start another attempt at `at`."""

    at: datetime
    after: str
    """Reason of the attempt before."""


@dataclass(frozen=True)
class Stop:
    """No further attempt could help, or none is left."""

    reason: str
    message: str


def verdict(attempts: Sequence[Attempt], spec: FineTuneJobSpec, uid: str) -> Retry | Stop:
    """What to do after the last of `attempts`, all of which have ended. `uid` seeds the jitter."""
    last = attempts[-1]
    reason, message = last.reason or CRASHED, last.message or ""
    if reason in FINAL:
        return Stop(reason, message)
    if reason == OUT_OF_MEMORY:
        if spec.recovery.on_out_of_memory == "Fail":
            return Stop(reason, f"{message} (recovery.onOutOfMemory is Fail)")
        if micro_batch(attempts[:-1], spec) == 1 or last.micro_batch_size == 1:
            return Stop(reason, f"{message} The micro-batch is 1 already: lower training.maxLength or lora.rank")
    counted = [attempt for attempt in attempts if attempt.reason not in UNCOUNTED]
    if len(counted) >= spec.recovery.max_attempts and reason not in UNCOUNTED:
        return Stop(reason, f"{len(counted)} of {spec.recovery.max_attempts} attempts failed; the last: {message}")
    return Retry((last.finished_at or _LONG_AGO) + _delay(last, len(counted), spec, uid), reason)


def _delay(last: Attempt, counted: int, spec: FineTuneJobSpec, uid: str) -> timedelta:
    """Exponential backoff, ±10 % by a hash, so that every reconcile computes the same moment."""
    if last.reason in (OUT_OF_MEMORY, SUSPENDED):
        return timedelta(0)
    doublings = 0 if last.reason in UNCOUNTED else min(counted - 1, 16)
    seconds = min(spec.recovery.backoff_seconds * 2**doublings, MAX_BACKOFF_SECONDS)
    digest = hashlib.sha256(f"{uid}/{last.job_name}".encode()).digest()
    return timedelta(seconds=round(seconds * (0.9 + 0.2 * digest[0] / 255)))


def micro_batch(attempts: Sequence[Attempt], spec: FineTuneJobSpec) -> int | None:
    """Micro-batch that the next attempt must take because GPU memory ran out before; None while it never did.

    It halves each time, down to a divisor of the sequences per GPU, so that the effective batch stays the same.
    """
    per_gpu = spec.training.batch_size // (spec.resources.nodes * max(1, spec.resources.gpus_per_node))
    size: int | None = None
    for attempt in attempts:
        if attempt.reason != OUT_OF_MEMORY:
            continue
        asked = spec.training.micro_batch_size
        tried = attempt.micro_batch_size or size or (asked if isinstance(asked, int) else per_gpu)
        size = _divisor(per_gpu, min(tried, size or tried) // 2)
    return size


def _divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is <= `at_most`, at least 1."""
    return next((d for d in range(min(at_most, number), 1, -1) if number % d == 0), 1)


def exit_codes() -> tuple[int, ...]:
    """Exit codes that end a Job at once; the child's podFailurePolicy lists them."""
    return names.FINAL_EXIT_CODES
