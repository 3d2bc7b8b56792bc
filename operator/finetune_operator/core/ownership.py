"""Tell the Jobs that the operator created from those that only say so.

Whoever may create Jobs can make one with our owner reference and the name of an attempt. What they cannot write is the
status, so the uid of each Job that the operator creates is recorded there. A crash between the two leaves a Job of
which nothing is recorded, and several crashes several: one is taken only if it is the next and exactly what would be
built now.
"""

from dataclasses import replace
from datetime import datetime

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt, FineTuneJobStatus
from finetune_operator.core import policy
from finetune_operator.core.attempts import failure, history, retry, spec_revision
from finetune_operator.core.attempts.history import AttemptHistory
from finetune_operator.core.builders import job
from finetune_operator.core.objects.job_digest import digest_of
from finetune_operator.core.objects.observed import Child, Observed
from finetune_operator.settings import Settings

_REFUSED = (
    "Job {} names this job as its controller but is not what this operator builds: somebody else created or changed it,"
    " or the operator's settings changed before it was recorded. It is deleted"
)


def settle(
    observed: Observed, status: FineTuneJobStatus, spec: FineTuneJobSpec, settings: Settings, now: datetime
) -> tuple[Observed, AttemptHistory]:
    """Return what is known of the job's own attempts; all other Jobs that claim to be of this job are strangers."""
    known = {attempt.job_name: attempt.job_uid for attempt in status.attempts}
    # An attempt without a uid was recorded by an older version.
    mine = tuple(child for child in observed.children if child.name in known and known[child.name] in (None, child.uid))
    others = tuple(child for child in observed.children if child not in mine)
    told = _without(observed, mine, others)
    attempts = history.update(told, status, spec, now)
    # More than one may be unrecorded: a status may fail to be written for as long as an attempt and the next take.
    while others:
        last = attempts.history[-1] if attempts.history else None
        if last and last.reason is None:
            child = history.child_of(told, last.job_name)
            if child and not child.finished:
                break
            return replace(told, children=observed.children, strangers=()), attempts  # it ends: the next may be there
        number = history.next_number(attempts.history, told)
        found = next((child for child in others if child.name == history.job_name(observed.job, number)), None)
        if found is None or not _may_follow(observed, attempts, spec, settings):
            break
        micro, avoided = retry.next_micro_batch(attempts.history, spec), retry.nodes_to_avoid(attempts.history)
        built = job.build(observed.job, spec, number, micro, settings, avoided)[-1]
        if found.digest != digest_of(built):
            return told, replace(attempts, history=[*attempts.history, _refused(found, spec, now)])
        mine, others = (*mine, found), tuple(child for child in others if child is not found)
        told = _without(observed, mine, others)
        attempts = history.update(told, status, spec, now)
    return told, attempts


def _without(observed: Observed, children: tuple[Child, ...], strangers: tuple[Child, ...]) -> Observed:
    uids = {child.uid for child in strangers}
    pods = tuple(pod for pod in observed.pods if pod.owner not in uids)
    return replace(observed, children=children, strangers=strangers, pods=pods)


def _may_follow(observed: Observed, attempts: AttemptHistory, spec: FineTuneJobSpec, settings: Settings) -> bool:
    """Return whether the operator itself may start another attempt now."""
    if attempts.history:
        if attempts.history[-1].reason in failure.ENDED_WELL:
            return False
        if isinstance(retry.decide_retry(attempts.history, spec, observed.job.uid), retry.Stop):
            return False
    return policy.check_policy(observed.job, spec, settings) is None


def _refused(child: Child, spec: FineTuneJobSpec, now: datetime) -> Attempt:
    """Return the record of a Job that is not taken for an attempt, although it has the next one's name."""
    is_outdated = child.revision not in ("", spec_revision.revision_of(spec))
    reason = failure.SPEC_CHANGED if is_outdated else failure.JOB_REFUSED
    message = spec_revision.SPEC_SUPERSEDED if is_outdated else _REFUSED.format(child.name)
    return Attempt(
        job_name=child.name,
        job_uid=child.uid,
        reason=reason,
        message=message,
        started_at=child.created_at,
        finished_at=now,
        run_seconds=0,
    )


def remarks(observed: Observed) -> list[str]:
    """Return what somebody else did to the Jobs of a running attempt, and what to do about it."""
    lost = [child.name for child in observed.children if not child.finished and child.owner != observed.job.uid]
    found = [f"the owner reference to this job was removed from Job {name}: put it back, or it outlives this job"
             for name in lost]  # fmt: skip
    return [*found, *(_REFUSED.format(child.name) for child in observed.strangers if not child.finished)]
