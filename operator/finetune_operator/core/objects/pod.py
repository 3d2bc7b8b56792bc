"""A pod of an attempt, as decisions see it: its containers, how they ended, and what Kubernetes did to it."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from finetune_api import constants
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.raw import Raw

_INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
_ACTIVE_PHASES = ("Pending", "Running", "Unknown", "")
_LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


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
            index=raw.number(index),
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
    return raw.number(job.rpartition("-")[2] if job else raw.labels(obj).get(constants.LABEL_ATTEMPT, ""))


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
