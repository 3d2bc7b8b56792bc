"""Kinds of API objects, and the key by which one object is queued and cached."""

from dataclasses import dataclass

from finetune_api import constants


@dataclass(frozen=True, slots=True)
class ObjectKey:
    """Identify one reconciled object. The kind is part of it: two kinds may share a namespace and a name."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind as the API server serves it; `group` is empty for the core API."""

    name: str
    group: str
    version: str
    plural: str

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version


FINETUNE_JOB = Kind(constants.KIND, constants.GROUP, constants.VERSION, constants.PLURAL)
FINETUNE_SWEEP = Kind(constants.SWEEP_KIND, constants.GROUP, constants.VERSION, constants.SWEEP_PLURAL)
JOB = Kind("Job", "batch", "v1", "jobs")
POD = Kind("Pod", "", "v1", "pods")
SERVICE = Kind("Service", "", "v1", "services")
EVENT = Kind("Event", "", "v1", "events")
NETWORK_POLICY = Kind("NetworkPolicy", "networking.k8s.io", "v1", "networkpolicies")
