"""What a sweep says of itself: the sentence of its summary condition, and its events. Its trials have their own."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

from finetune_api.spec_pack import Objective
from finetune_api.sweep_packs import Holder
from finetune_api.sweep_status import FineTuneSweepStatus, TrialStatus
from finetune_api.sweep_trials import job_name
from finetune_operator.core.objects import status_io
from finetune_operator.core.status.events import Event
from finetune_operator.core.sweep.observed import ObservedSweep

#: Reason of a trial whose FineTuneJob somebody deleted before it had ended.
DELETED = "Deleted"
#: Reasons of an open end that are no news, or that another condition tells.
_QUIET = ("Running", "Suspended", "Resuming")
#: Of reasons, of trials of each, and of packs, so many are named.
_NAMED = 3
_WHY_DELETED = (
    "somebody deleted their FineTuneJobs before they had ended, and a sweep creates none twice: to train them, create"
    " another sweep of them"
)


def stopped(sentence: str) -> Event:
    """Return the event of a trial that was stopped early, given the sentence that says so."""
    return Event("Normal", "TrialStopped", sentence, sentence.split(":")[0])


def deleted(trial: str, job: str) -> Event:
    """Return the event of a trial whose FineTuneJob is gone before its end."""
    told = f"trial {trial} failed: FineTuneJob {job} was deleted before it had ended, and is not created again"
    return Event("Warning", "TrialDeleted", told, f"deleted/{trial}")


def left_alone(pack: str, reason: str, trials: int) -> Event:
    """Return the event of a pack that has ended before so many of its trials."""
    return Event("Warning", "PackEnded", _left_alone(pack, reason, trials), f"left alone/{pack}")


def _left_alone(pack: str, reason: str, trials: int) -> str:
    goes = "1 of its trials: it goes" if trials == 1 else f"{trials} of its trials: each goes"
    return f"{pack} ended ({reason}) before {goes} on in a FineTuneJob of its own"


def running(observed: ObservedSweep, held: Sequence[Holder], status: FineTuneSweepStatus) -> str:
    """Return how far the sweep is, and which packs have ended before their trials."""
    counts, table = status.counts, {row.name: row for row in status.trials}
    told = [f"{counts.total - counts.waiting - counts.active} of {counts.total} ended"]
    broken = []
    for holder in held:
        name = job_name(observed.sweep.name, holder.name)
        state = job.trial if holder.is_pack and (job := observed.jobs.get(name)) else None
        if state is None or state.outcome == "Unknown":
            continue
        alone = [trial for trial in holder.trials if trial not in table or table[trial].job_name != name]
        broken += [_left_alone(name, state.reason, len(alone))] if alone else []
    more = [f"and {len(broken) - _NAMED} packs more"] if len(broken) > _NAMED else []
    return "; ".join([*told, *broken[:_NAMED], *more])


def ended(sweep: str, status: FineTuneSweepStatus, objective: Objective) -> str:
    """Return how the trials ended, why those failed that did, and what the user can do about it."""
    counts, best = status.counts, status.best
    failed = [row for row in status.trials if row.phase == "Failed"]
    told = f"{counts.succeeded} of {counts.total} trials succeeded, {counts.stopped} were stopped early and" \
           f" {counts.failed} failed{_reasons(failed)}"  # fmt: skip
    told += f"; best: {best.trial} with {objective.metric} {best.value:.6g}" if best else "; none succeeded"
    if any(row.reason == DELETED for row in failed):
        told += f". {DELETED}: {_WHY_DELETED}"
    if not best and (row := next((row for row in failed if row.reason != DELETED), None)):
        told += f". finetune status {row.job_name or job_name(sweep, row.name)} says why {row.name} failed"
    return told


def _reasons(failed: Sequence[TrialStatus]) -> str:
    """Return the reasons of failures, the commonest first, each with names."""
    found = defaultdict[str, list[str]](list)
    for row in failed:
        found[row.reason or "no reason is known"].append(row.name)
    if not found:
        return ""
    ordered = sorted(found.items(), key=lambda each: -len(each[1]))
    said = [f"{reason}: {_some(names)}" for reason, names in ordered[:_NAMED]]
    return f" ({'; '.join([*said, *(['…'] if len(ordered) > _NAMED else [])])})"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def events(old: FineTuneSweepStatus, new: FineTuneSweepStatus) -> Iterator[Event]:
    """Yield the events of what changed for the sweep itself."""
    for kind in ("Suspended", "Succeeded"):
        before, after = status_io.condition(old, kind), status_io.condition(new, kind)
        if after is None or (before and (before.status, before.reason) == (after.status, after.reason)):
            continue
        subject = f"{kind}/{after.status}/{after.reason}"
        if after.status == "True":
            yield Event("Normal", after.reason, after.message, subject)
        elif kind == "Succeeded" and after.reason not in _QUIET:
            yield Event("Warning", after.reason, after.message, subject)
