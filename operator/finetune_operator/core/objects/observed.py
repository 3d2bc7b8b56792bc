"""Small frozen views of API objects, with only what decisions need.

Thousands of views stay in memory, so specs and statuses are kept as compact JSON and read when they are needed.
"""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from pydantic_core import to_json

from finetune_api import constants
from finetune_api.status import TrainerReport
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.raw import Raw

_KUEUE_LABELS = (constants.LABEL_KUEUE_QUEUE, constants.LABEL_KUEUE_PRIORITY)
_INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
_JOB_FINISHED = ("Complete", "Failed")
WAITING_PHASES = ("Pending", "Queued")
_ACTIVE_PHASES = ("Pending", "Running", "Unknown", "")
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


#: Bytes of spec and status that stay in memory; larger ones, which hardly any job has, are read when they are needed.
KEPT_BYTES = 16 * 1024


def _packed(value: Any) -> bytes:
    return to_json(value)


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
    is_whole: bool = True
    """Whether spec and status are here; else they are to be read from the API server."""

    def kept(self) -> "JobObject":
        """Return what of the job stays in memory: little, whatever it holds."""
        if len(self.spec) + len(self.status) <= KEPT_BYTES:
            return self
        return replace(self, spec=b"{}", status=b"{}", is_whole=False)

    @property
    def key(self) -> ObjectKey:
        return ObjectKey(constants.KIND, self.namespace, self.name)

    @classmethod
    def from_api(cls, obj: Raw) -> "JobObject":
        meta, found = raw.mapping(obj, "metadata"), raw.labels(obj)
        return cls(
            namespace=raw.text(meta, "namespace"),
            name=raw.text(meta, "name"),
            uid=raw.text(meta, "uid"),
            version=raw.version(obj),
            generation=min(max(0, raw.integer(meta, "generation")), 2**53),
            created_at=raw.timestamp(meta, "creationTimestamp"),
            deleting=bool(meta.get("deletionTimestamp")),
            queue_labels={label: found[label] for label in _KUEUE_LABELS if label in found},
            phase=raw.text(obj, "status", "phase") or "Pending",
            gpus=_gpus(raw.mapping(obj, "spec", "resources")),
            attempts=len(raw.entries(obj, "status", "attempts")),
            waiting_since=_waiting_since(obj),
            spec=_packed(obj.get("spec")),
            status=_packed(raw.mapping(obj, "status")),
        )


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

    @classmethod
    def from_api(cls, obj: Raw) -> "Child":
        end, kind = next(((c, k) for k in _JOB_FINISHED if (c := raw.condition(obj, k))), ({}, ""))
        found = raw.labels(obj)
        return cls(
            name=raw.text(obj, "metadata", "name"),
            uid=raw.text(obj, "metadata", "uid"),
            version=raw.version(obj),
            owner=raw.text(raw.controller(obj), "uid"),
            attempt=_number(raw.text(obj, "metadata", "name").rpartition("-")[2]),
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
        )


@dataclass(frozen=True, slots=True)
class Exit:
    """The termination of a container."""

    code: int
    reason: str
    message: str
    finished_at: datetime | None


@dataclass(frozen=True, slots=True)
class InitContainer:
    """The init container that a pod is at, before its trainer starts; webhooks add them."""

    name: str
    waiting: tuple[str, str]
    """Reason and message while it waits."""
    running: bool
    exit: Exit | None


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod of an attempt. `owner` is the uid of its Job, `index` its completion index (0 for a single pod)."""

    name: str
    uid: str
    version: int
    owner: str
    attempt: int
    index: int
    created_at: datetime
    phase: str
    ip: str
    deleting: bool
    stop_by: datetime | None
    """End of its grace period, once it is told to stop."""
    deleted_at: datetime | None
    """When it was told to stop."""
    started_at: datetime | None
    running: bool
    exit: Exit | None
    reason: str
    """Why the kubelet or the control plane ended it (Evicted, NodeLost, …)."""
    message: str
    disruption: str
    """Message of the DisruptionTarget condition, or its reason; empty when it was not disrupted."""
    disrupted_at: datetime | None
    unschedulable: str
    """The scheduler's sentence while there is no node for it."""
    waiting: tuple[str, str]
    """Reason and message of the container that waits."""
    init: InitContainer | None
    """The init container that has not succeeded yet."""
    node: str
    set_up: bool
    """Whether its volumes are mounted and its network is ready."""
    memory_limit: str
    """The trainer's limit in force: a LimitRange or a webhook may have set it."""
    beside: tuple[str, ...]
    """Other containers that still run."""

    @property
    def live(self) -> bool:
        """Whether its trainer may still run. Other containers of the pod write nothing of ours."""
        return self.phase in _ACTIVE_PHASES and self.exit is None

    @property
    def held_open(self) -> bool:
        """Whether its trainer has ended but other containers keep it from ending."""
        return self.phase in _ACTIVE_PHASES and self.exit is not None

    @classmethod
    def from_api(cls, obj: Raw) -> "Pod":
        statuses = raw.entries(obj, "status", "containerStatuses")
        trainer = next((s for s in statuses if s.get("name") == constants.TRAINER_CONTAINER), {})
        ended = raw.mapping(trainer, "state", "terminated")
        running, waiting = raw.mapping(trainer, "state", "running"), raw.mapping(trainer, "state", "waiting")
        disrupted = raw.condition(obj, "DisruptionTarget")
        index = raw.text(obj, "metadata", "annotations", _INDEX_ANNOTATION) or raw.labels(obj).get(
            _INDEX_ANNOTATION, ""
        )
        return cls(
            name=raw.text(obj, "metadata", "name"),
            uid=raw.text(obj, "metadata", "uid"),
            version=raw.version(obj),
            owner=raw.text(raw.controller(obj), "uid"),
            attempt=_attempt(obj),
            index=_number(index),
            created_at=raw.timestamp(obj, "metadata", "creationTimestamp") or _LONG_AGO,
            phase=raw.text(obj, "status", "phase"),
            ip=raw.text(obj, "status", "podIP"),
            deleting=bool(raw.at(obj, "metadata", "deletionTimestamp")),
            stop_by=raw.timestamp(obj, "metadata", "deletionTimestamp"),  # Kubernetes has added the grace already
            started_at=raw.timestamp(running, "startedAt") or raw.timestamp(ended, "startedAt"),
            running=bool(running),
            exit=_exit(ended) if ended else None,
            reason=raw.text(obj, "status", "reason"),
            message=raw.text(obj, "status", "message"),
            deleted_at=_deleted_at(obj),
            disruption=raw.text(disrupted, "message") or raw.text(disrupted, "reason"),
            disrupted_at=raw.timestamp(disrupted, "lastTransitionTime"),
            unschedulable=_unschedulable(obj),
            waiting=(raw.text(waiting, "reason"), raw.text(waiting, "message")),
            init=None if running or ended else _init_container(obj),
            node=raw.text(obj, "spec", "nodeName"),
            set_up=bool(raw.condition(obj, "PodReadyToStartContainers")),
            memory_limit=_memory_limit(obj),
            beside=_running_beside(obj),
        )


def _attempt(obj: Raw) -> int:
    """Return the attempt of a pod by its Job's name; by its label where nothing controls it."""
    job = raw.text(raw.controller(obj), "name")
    return _number(job.rpartition("-")[2] if job else raw.labels(obj).get(constants.LABEL_ATTEMPT, ""))


def _number(value: str) -> int:
    return int(value) if value.isdecimal() and len(value) < 10 else 0


def _deleted_at(obj: Raw) -> datetime | None:
    """Return when the pod was told to stop: Kubernetes keeps the end of its grace period, and its length."""
    end = raw.timestamp(obj, "metadata", "deletionTimestamp")
    grace = min(max(0, raw.integer(obj, "metadata", "deletionGracePeriodSeconds")), 10**8)
    return end - timedelta(seconds=grace) if end and end.year > _LONG_AGO.year else end


def _memory_limit(obj: Raw) -> str:
    for container in raw.entries(obj, "spec", "containers"):
        if container.get("name") == constants.TRAINER_CONTAINER:
            return str(raw.at(container, "resources", "limits", "memory") or "")[:64]
    return ""


def _running_beside(obj: Raw) -> tuple[str, ...]:
    found = [*raw.entries(obj, "status", "containerStatuses"), *raw.entries(obj, "status", "initContainerStatuses")]
    names = (raw.text(each, "name") for each in found if raw.at(each, "state", "running") is not None)
    return tuple(name for name in names if name != constants.TRAINER_CONTAINER)


def _exit(ended: Raw) -> Exit:
    return Exit(
        code=raw.integer(ended, "exitCode"),
        reason=raw.text(ended, "reason"),
        message=raw.text(ended, "message"),
        finished_at=raw.timestamp(ended, "finishedAt"),
    )


def _init_container(obj: Raw) -> InitContainer | None:
    """Return the first init container that holds up those after it; a sidecar only until it has started."""
    containers = raw.entries(obj, "spec", "initContainers")
    sidecars = {raw.text(each, "name") for each in containers if each.get("restartPolicy") == "Always"}
    for status in raw.entries(obj, "status", "initContainerStatuses"):
        name, ended = raw.text(status, "name"), raw.mapping(status, "state", "terminated")
        if status.get("started") is True if name in sidecars else ended and not raw.integer(ended, "exitCode"):
            continue
        waiting = raw.mapping(status, "state", "waiting")
        return InitContainer(
            name=name,
            waiting=(raw.text(waiting, "reason"), raw.text(waiting, "message")),
            running=bool(raw.mapping(status, "state", "running")),
            exit=_exit(ended) if ended else None,
        )
    return None


def _unschedulable(obj: Raw) -> str:
    for entry in raw.entries(obj, "status", "conditions"):
        if entry.get("type") == "PodScheduled" and entry.get("status") == "False":
            return raw.text(entry, "message") or raw.text(entry, "reason")
    return ""


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
    """Jobs that the FineTuneJob controls."""
    pods: tuple[Pod, ...] = ()
    """Pods of `children`."""
    foreign_children: tuple[str, ...] = ()
    """Unfinished Jobs and live pods of an earlier job of the same name: "Job nli-1", "pod nli-1-x7k2p"."""
    unlabeled: tuple[str, ...] = ()
    """Jobs and pods that have lost our label ("Pod nli-1-x7k2p"): they are looked up by name."""
    wait_reasons: dict[str, WaitReason] = field(default_factory=dict)
    """By uid of the child or pod."""
