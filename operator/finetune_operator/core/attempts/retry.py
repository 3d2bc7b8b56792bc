"""Decide from all ended attempts: retry, retry with a smaller micro-batch, or stop."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from finetune_api.packed_jobs import pass_layout
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt
from finetune_operator.core.attempts.failure import (
    CRASHED,
    FINAL,
    GPU_UNAVAILABLE,
    NOT_COUNTED_AS_FAILURE,
    OUT_OF_MEMORY,
    SPEC_CHANGED,
    SUSPENDED,
)

MAX_BACKOFF_SECONDS = 600
_MOST_DOUBLINGS = 16
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Retry:
    """Start another attempt at `at`, because the last one ended with reason `after`."""

    at: datetime
    after: str


@dataclass(frozen=True)
class Stop:
    """Stop: no further attempt can succeed, or none is left."""

    reason: str
    message: str


def decide_retry(attempts: Sequence[Attempt], spec: FineTuneJobSpec, uid: str) -> Retry | Stop:
    """Decide what follows the last of `attempts`, all of which have ended. `uid` seeds the jitter."""
    last = attempts[-1]
    reason, message = last.reason or CRASHED, last.message or ""
    if reason in FINAL:
        return Stop(reason, message)
    if reason == OUT_OF_MEMORY:
        if spec.recovery.on_out_of_memory == "Fail":
            return Stop(reason, f"{message} (recovery.onOutOfMemory is Fail)")
        if next_micro_batch(attempts[:-1], spec) == 1 or last.micro_batch_size == 1:
            return Stop(reason, f"{message} The micro-batch is 1 already: lower training.maxLength or lora.rank")
    counted = [attempt for attempt in attempts if attempt.reason not in NOT_COUNTED_AS_FAILURE]
    if len(counted) >= spec.recovery.max_attempts and reason not in NOT_COUNTED_AS_FAILURE:
        return Stop(reason, f"{len(counted)} of {spec.recovery.max_attempts} attempts failed; the last: {message}")
    failures = _failures_without_progress(attempts) if reason in NOT_COUNTED_AS_FAILURE else len(counted)
    if reason == GPU_UNAVAILABLE and last.node in nodes_to_avoid(attempts[:-1]):
        failures = 1 + _MOST_DOUBLINGS  # no other node was free: it needs a repair, or the others' jobs an end
    return Retry((last.finished_at or _LONG_AGO) + _delay(last, failures, spec, uid), reason)


def _failures_without_progress(attempts: Sequence[Attempt]) -> int:
    """Count the latest endings that made no progress and do not count as failures: back off from a node that evicts."""
    count = 0
    for number in range(len(attempts) - 1, -1, -1):
        attempt, before = attempts[number], attempts[:number]
        best = max((earlier.last_step or 0 for earlier in before), default=0)
        if attempt.reason not in NOT_COUNTED_AS_FAILURE or (attempt.last_step or 0) > best:
            break
        count += attempt.reason not in (SUSPENDED, SPEC_CHANGED)
    return count


def _delay(last: Attempt, failures: int, spec: FineTuneJobSpec, uid: str) -> timedelta:
    """Return the exponential backoff, ±10 % by a hash, so that every reconcile computes the same time."""
    if last.reason in (OUT_OF_MEMORY, SUSPENDED, SPEC_CHANGED):
        return timedelta(0)
    doublings = min(max(0, failures - 1), _MOST_DOUBLINGS)
    seconds = min(spec.recovery.backoff_seconds * 2**doublings, MAX_BACKOFF_SECONDS)
    digest = hashlib.sha256(f"{uid}/{last.job_name}".encode()).digest()
    return timedelta(seconds=round(seconds * (0.9 + 0.2 * digest[0] / 255)))


def next_micro_batch(attempts: Sequence[Attempt], spec: FineTuneJobSpec) -> int | None:
    """Return the micro-batch of the next attempt after a GPU out-of-memory; None when there was none.

    It halves each time, to a divisor of the sequences per GPU, so that the effective batch stays the same. That of a
    pack counts the rows of all trials in a pass: it halves to fewer trials, then to parts of the step of one.
    """
    at_once = spec.pack.at_once if spec.pack else 1
    per_gpu = spec.training.batch_size // (spec.resources.nodes * max(1, spec.resources.gpus_per_node))
    size: int | None = None
    for attempt in attempts:
        if attempt.reason != OUT_OF_MEMORY:
            continue
        asked = spec.training.micro_batch_size
        tried = attempt.micro_batch_size or size or at_once * (asked if isinstance(asked, int) else per_gpu)
        half = min(tried, size or tried) // 2
        size = math.prod(pass_layout(spec, half)) if spec.pack else _divisor(per_gpu, half)
    return size


def nodes_to_avoid(attempts: Sequence[Attempt]) -> list[str]:
    """Return the nodes on which an attempt found no GPU that works: the next one should run elsewhere."""
    return sorted({attempt.node for attempt in attempts if attempt.reason == GPU_UNAVAILABLE and attempt.node})


def _divisor(number: int, at_most: int) -> int:
    """Return the largest divisor of `number` that is <= `at_most`, at least 1."""
    return next((d for d in range(min(at_most, number), 1, -1) if number % d == 0), 1)
