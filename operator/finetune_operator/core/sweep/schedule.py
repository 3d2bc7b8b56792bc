"""Which FineTuneJobs of a sweep are to be created next: packs, and trials of their own, within spec.parallelism."""

from collections import Counter
from collections.abc import Sequence, Set

from finetune_api.sweep_packs import Holder
from finetune_api.sweep_status import TrialStatus
from finetune_api.sweep_trials import job_name
from finetune_operator.core.sweep.observed import ObservedSweep


def waiting(observed: ObservedSweep, held: Sequence[Holder], started: Set[str]) -> list[Holder]:
    """Return the jobs that are still to be created. What is left of a pack that was begun goes on trial by trial."""
    found = list[Holder]()
    for holder in held:
        left = tuple(name for name in holder.trials if name not in started)
        is_whole = left == holder.trials and job_name(observed.sweep.name, holder.name) not in observed.jobs
        found += [holder] if is_whole else [Holder(name, (name,)) for name in left]
    return found


def training(observed: ObservedSweep, held: Sequence[Holder], live: Sequence[TrialStatus]) -> int:
    """Return how many trials train at the same time: of a pack as many as fit, of the others each."""
    most = {job_name(observed.sweep.name, holder.name): holder.at_once for holder in held if holder.is_pack}
    shared = Counter(row.job_name for row in live if row.job_name)
    alone = len(live) - sum(shared.values())
    return alone + sum(min(count, most.get(name, count)) for name, count in shared.items())


def due(waiting: Sequence[Holder], room: int, *, is_idle: bool) -> list[Holder]:
    """Return the next jobs to create, in their order; a pack that is larger than all the room there is goes alone."""
    found = list[Holder]()
    for holder in waiting:
        if holder.at_once > room and not (is_idle and not found):
            break
        found.append(holder)
        room -= holder.at_once
    return found
