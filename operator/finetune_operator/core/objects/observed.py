"""Small frozen views of API objects, with only what decisions need.

Thousands of views stay in memory, so specs and statuses are kept as compact JSON and read when they are needed.
"""

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, get_args

from pydantic_core import from_json, to_json

from finetune_api import constants, manifest, packed_jobs, uri
from finetune_api.spec_pack import MAX_PACK, MAX_SWEEP_NAME, Objective
from finetune_api.status import TrainerReport
from finetune_api.trial_report import TrialReport, readable
from finetune_operator.core.objects import job_digest, raw
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.pod import Pod
from finetune_operator.core.objects.raw import Raw

_KUEUE_LABELS = (constants.LABEL_KUEUE_QUEUE, constants.LABEL_KUEUE_PRIORITY)
_JOB_FINISHED = ("Complete", "Failed")
WAITING_PHASES = ("Pending", "Queued")
_OBJECTIVES = get_args(Objective.model_fields["metric"].annotation)


#: Bytes of spec and status that stay in memory; larger ones, which hardly any job has, are read when they are needed.
KEPT_BYTES = 16 * 1024
KEPT_PROGRESS_BYTES = 1024


def _packed(value: Any) -> bytes:
    return to_json(value)


@dataclass(frozen=True, slots=True)
class TrialState:
    """What a sweep needs of the FineTuneJob of one of its trials, or of several."""

    owner: str
    """Uid of the sweep that controls it."""
    sweep: str
    """Name of that sweep."""
    asked_to_suspend: bool
    suspended: bool
    outcome: str
    """Status of its condition Succeeded: True, False or Unknown."""
    reason: str
    step: int
    eval_loss: float | None
    metrics: dict[str, float]
    """Final values of the metrics that sweeps compare."""
    uri: str
    """Where its adapter lies; of a pack, the folder of all its trials' folders."""
    packed: dict[str, TrialReport] | None = None
    """Where each trial of a pack stands; None for a job of one trial."""
    values: str = ""
    """What was drawn for it when it started, as JSON; empty where its values follow from the sweep's spec."""

    @property
    def drawn(self) -> dict[str, Any]:
        """The values that were drawn for it, by path; none where they cannot be read."""
        try:
            found = from_json(self.values or "{}", allow_inf_nan=False)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    @classmethod
    def from_api(cls, obj: Raw) -> "TrialState | None":
        """Read a FineTuneJob; None where no sweep controls it."""
        owner = raw.controller(obj)
        if raw.text(owner, "kind") != constants.SWEEP_KIND:
            return None
        status = raw.mapping(obj, "status")
        summary: Raw = next((c for c in raw.entries(status, "conditions") if c.get("type") == "Succeeded"), {})
        outcome = raw.text(summary, "status")
        found = {name: raw.decimal(status, "metrics", name) for name in _OBJECTIVES}
        is_pack = bool(raw.mapping(obj, "spec", "pack"))
        return cls(
            owner=raw.text(owner, "uid"),
            sweep=raw.text(owner, "name")[:MAX_SWEEP_NAME],
            asked_to_suspend=raw.flag(obj, "spec", "suspend"),
            suspended=bool(raw.condition(obj, "Suspended")),
            outcome=outcome if outcome in ("True", "False") else "Unknown",
            reason=raw.text(summary, "reason")[:128],
            step=raw.integer(status, "progress", "step"),
            eval_loss=raw.decimal(status, "progress", "evalLoss"),
            metrics={name: value for name, value in found.items() if value is not None},
            uri=raw.text(obj, "spec", "output", "uri") if is_pack else raw.text(status, "adapter", "uri"),
            packed={row.name: row for row in readable(status.get("trials"))} if is_pack else None,
            # It stays in memory, and anybody who may change the job can make it long: then it cannot be read.
            values=raw.text(obj, "metadata", "annotations", constants.ANNOTATION_VALUES)[:KEPT_BYTES],
        )


@dataclass(frozen=True, slots=True)
class JobObject:
    """A FineTuneJob. `spec` and `status` are JSON."""

    namespace: str
    name: str
    uid: str
    version: int
    generation: int
    created_at: datetime | None
    deleting: bool
    queue_labels: dict[str, str]
    phase: str
    gpus: int
    """GPUs it asks for, over all nodes."""
    attempts: int
    waiting_since: datetime | None
    """When it started to wait for its pods; None while they run."""
    spec: bytes
    status: bytes
    places: tuple[str, ...] = ()
    """Namespace and folder of all that it writes to; empty for what no other pod sees."""
    is_whole: bool = True
    """Whether spec and status are here; else only the progress, and they are to be read from the API server."""
    trial: TrialState | None = None
    """None for a job of no sweep."""
    cost_label: str = ""
    """Value of the label that its cost is summed by."""

    def kept(self) -> "JobObject":
        """Return what of the job stays in memory: little, whatever it holds."""
        if len(self.spec) + len(self.status) <= KEPT_BYTES:
            return self
        found = from_json(self.status)  # for the metrics of finished jobs
        status = _packed({part: value for part in ("progress", "usage") if (value := raw.mapping(found, part))})
        return replace(self, spec=b"{}", status=status if len(status) <= KEPT_PROGRESS_BYTES else b"{}", is_whole=False)

    @property
    def claims(self) -> bool:
        """Whether its places are taken: from its creation to its end, but not while it is suspended before it began."""
        return bool(self.places) and self.phase not in (
            "Succeeded",
            "Failed",
            *([] if self.attempts else ["Suspended"]),
        )

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(constants.KIND, self.namespace, self.name)

    @classmethod
    def from_api(cls, obj: Raw, cost_label: str = "") -> "JobObject":
        """Read a FineTuneJob. `cost_label` is the key of the label that costs are summed by."""
        found = raw.labels(obj)
        return cls(
            **raw.identity(obj),
            queue_labels={label: found[label] for label in _KUEUE_LABELS if label in found},
            phase=raw.text(obj, "status", "phase") or "Pending",
            gpus=_gpus(raw.mapping(obj, "spec", "resources")),
            attempts=len(raw.entries(obj, "status", "attempts")),
            waiting_since=_waiting_since(obj),
            spec=_packed(obj.get("spec")),
            status=_packed(raw.mapping(obj, "status")),
            places=_places(obj),
            trial=TrialState.from_api(obj),
            cost_label=found.get(cost_label, "")[:63],
        )


def _places(obj: Raw) -> tuple[str, ...]:
    """Return where adapters go. A bucket's name may mean another store in another namespace, with its Secret."""
    name, namespace = raw.text(obj, "metadata", "name"), raw.text(obj, "metadata", "namespace")
    output = str(manifest.with_name(raw.text(obj, "spec", "output", "uri")[: uri.MAX_LENGTH], name))
    if not output.startswith(("s3://", "pvc://")):
        return ()
    trials = [raw.text(trial, "name") for trial in raw.entries(obj, "spec", "pack", "trials")[:MAX_PACK]]
    outputs = [packed_jobs.trial_uri(output, trial) for trial in trials] or [output]
    return tuple(f"{namespace} {uri.place(each)}" for each in outputs)


def _gpus(resources: Raw) -> int:
    """Read the size; the API server fills in the defaults, without it they are one node with one GPU."""
    nodes, each = resources.get("nodes", 1), resources.get("gpusPerNode", 1)
    return nodes * each if isinstance(nodes, int) and isinstance(each, int) else 0


def _waiting_since(obj: Raw) -> datetime | None:
    for entry in raw.entries(obj, "status", "conditions"):
        if entry.get("type") == "Scheduled":
            return raw.timestamp(entry, "lastTransitionTime") if entry.get("status") == "False" else None
    return raw.timestamp(obj, "metadata", "creationTimestamp")


@dataclass(frozen=True, slots=True)
class Child:
    """A batch/v1 Job that carries our label: one attempt of the FineTuneJob whose uid is `owner`."""

    name: str
    uid: str
    version: int
    owner: str
    attempt: int
    revision: str
    """The spec it was made from (core/attempts/spec_revision.py); empty where an older version made it."""
    created_at: datetime | None
    suspended: bool
    queued: bool
    """Whether Kueue decides when it runs."""
    active: int
    terminating: int
    """Pods that were told to stop and have not."""
    finished: str
    """Complete, Failed, or empty while it is not over (KEP-3939: only after every pod has ended)."""
    finished_at: datetime | None
    reason: str
    message: str
    deleting: bool
    parallelism: int
    """Pods that it runs at most; we set as many as there are nodes."""
    digest: str
    """What it runs (core/objects/job_digest.py)."""

    @classmethod
    def from_api(cls, obj: Raw) -> "Child":
        end, kind = next(((c, k) for k in _JOB_FINISHED if (c := raw.condition(obj, k))), ({}, ""))
        found = raw.labels(obj)
        return cls(
            name=raw.text(obj, "metadata", "name"),
            uid=raw.text(obj, "metadata", "uid"),
            version=raw.version(obj),
            owner=raw.text(raw.controller(obj), "uid"),
            attempt=raw.number(raw.text(obj, "metadata", "name").rpartition("-")[2]),
            revision=raw.text(obj, "metadata", "annotations", constants.ANNOTATION_REVISION),
            created_at=raw.timestamp(obj, "metadata", "creationTimestamp"),
            suspended=raw.flag(obj, "spec", "suspend"),
            queued=constants.LABEL_KUEUE_QUEUE in found,
            active=raw.integer(obj, "status", "active"),
            terminating=raw.integer(obj, "status", "terminating"),
            finished=kind,
            finished_at=raw.timestamp(obj, "status", "completionTime") or raw.timestamp(end, "lastTransitionTime"),
            reason=raw.text(end, "reason"),
            message=raw.text(end, "message"),
            deleting=bool(raw.at(obj, "metadata", "deletionTimestamp")),
            parallelism=raw.integer(obj, "spec", "parallelism"),
            digest=job_digest.digest_of(obj),
        )


@dataclass(frozen=True, slots=True)
class WaitReason:
    """Why an object waits, from an event or a Kueue Workload."""

    reason: str
    message: str
    at: datetime | None = field(default=None, compare=False)
    """When it was last reported; the same reason again is no change."""


@dataclass(frozen=True, slots=True)
class CreateBlocked:
    """Why the API server denied the creation of a child."""

    reason: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a reconcile adds to the cached objects of any kind."""

    report: TrainerReport | None = None
    """The latest report of the leader's trainer (Controller.leader)."""
    silent_since: datetime | None = None
    """When it last answered, once it has missed several polls."""
    create_blocked: CreateBlocked | None = None
    """Why a child of the last plan could not be created; the same plan must not be made again."""
    looked_up: bool = False
    """Whether Jobs and pods were read from the API server for this very plan (Plan.look_up)."""


@dataclass(frozen=True, kw_only=True)
class Observed(Observation):
    """Everything that is known of one FineTuneJob."""

    job: JobObject
    children: tuple[Child, ...] = ()
    """Jobs that the FineTuneJob controls, or that its status records; for decisions only those of its attempts."""
    strangers: tuple[Child, ...] = ()
    """Jobs that name the FineTuneJob as their controller although the operator did not create them (ownership.py)."""
    open_jobs: frozenset[str] = frozenset()
    """Uids of the Jobs of recorded attempts that have not ended."""
    pods: tuple[Pod, ...] = ()
    """Pods of `children`."""
    output_held_by: str = ""
    """Another job that writes to the same output and goes first."""
    foreign_children: tuple[str, ...] = ()
    """Unfinished Jobs and live pods of an earlier job of the same name: "Job nli-1", "pod nli-1-x7k2p"."""
    released: tuple[str, ...] = ()
    """Live pods that nothing controls: the Job controller lets a pod go, and starts another, when its labels change."""
    unlabeled: tuple[str, ...] = ()
    """Jobs and pods that have lost our label ("Pod nli-1-x7k2p"): they are looked up by name."""
    wait_reasons: dict[str, WaitReason] = field(default_factory=dict)
    """By uid of the child or pod."""
