"""All cached objects of one key, and how a FineTuneJob's controller reads them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from finetune_operator.core.objects import raw
from finetune_operator.core.objects.kinds import JOB, POD, ObjectKey
from finetune_operator.core.objects.observed import Child, JobObject, Observed, WaitReason
from finetune_operator.core.objects.pod import Pod


class View(Protocol):
    """What the cache needs of every object."""

    @property
    def uid(self) -> str: ...
    @property
    def version(self) -> int: ...


class ReconciledView(View, Protocol):
    """What the operator needs of an object that has a controller. `generation` changes when the user edits it."""

    @property
    def namespace(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def generation(self) -> int: ...
    @property
    def deleting(self) -> bool: ...


@dataclass(frozen=True)
class Snapshot:
    """One reconciled object with everything in the cache that names it as its owner.

    Attributes:
        owner: The reconciled object.
        children: Views by kind. A label names the owner, so an earlier object of the same name may own some of them.
        deleted_pods: The last pods of each Job that are gone; they may hold the only exit code.
        unlabeled: Kind and name of those that have lost their label, so that no watch shows them.
        tombstones: Uid of a deleted child -> uid of the object that owned it.
        wait_reasons: By uid of the child.
        output_held_by: Another FineTuneJob that writes to the same output and goes first.
    """

    key: ObjectKey
    owner: ReconciledView
    children: Mapping[str, tuple[View, ...]] = field(default_factory=dict)
    deleted_pods: tuple[Pod, ...] = ()
    unlabeled: tuple[str, ...] = ()
    tombstones: Mapping[str, str] = field(default_factory=dict)
    wait_reasons: Mapping[str, WaitReason] = field(default_factory=dict)
    output_held_by: str = ""


def observe(snapshot: Snapshot) -> Observed:
    """Tell the Jobs and pods of this very FineTuneJob from those of an earlier one of the same name."""
    job = snapshot.owner
    assert isinstance(job, JobObject)
    jobs = [view for view in snapshot.children.get(JOB.name, ()) if isinstance(view, Child)]
    pods = [view for view in snapshot.children.get(POD.name, ()) if isinstance(view, Pod)]
    attempts = raw.entries(json.loads(job.status), "attempts")
    recorded = {raw.text(attempt, "jobUid") for attempt in attempts}
    children = [child for child in jobs if child.owner == job.uid or child.uid in recorded]
    child_uids = {child.uid for child in children}
    # A pod whose Job is deleted still belongs to its attempt; one whose Job we never saw may be an earlier job's.
    mine = [pod for pod in pods if pod.owner in child_uids or snapshot.tombstones.get(pod.owner) == job.uid]
    deleted = [pod for pod in snapshot.deleted_pods if pod.owner in child_uids]
    foreign = [f"Job {child.name}" for child in jobs if child not in children and _is_in_the_way(child, job)]
    foreign += [f"pod {pod.name}" for pod in pods if pod not in mine and pod.live]
    uids = {*child_uids, *(pod.uid for pod in mine)}
    return Observed(
        job=job,
        children=tuple(sorted(children, key=lambda child: child.attempt)),
        open_jobs=frozenset(raw.text(attempt, "jobUid") for attempt in attempts if not attempt.get("reason")),
        pods=(*mine, *deleted),
        foreign_children=tuple(foreign),
        output_held_by=snapshot.output_held_by,
        released=tuple(pod.name for pod in pods if pod not in mine and pod.live and not pod.owner),
        unlabeled=snapshot.unlabeled,
        wait_reasons={uid: reason for uid, reason in snapshot.wait_reasons.items() if uid in uids},
    )


def _is_in_the_way(child: Child, job: JobObject) -> bool:
    """Return whether a Job that runs is another FineTuneJob's, or has an attempt's name but nobody who controls it."""
    return not child.finished and bool(child.owner or child.name.rpartition("-")[0] == job.name)
