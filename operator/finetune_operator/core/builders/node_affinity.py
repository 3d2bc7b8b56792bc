"""Send an attempt to other nodes than those on which an earlier one found no GPU that works."""

from collections.abc import Sequence
from typing import Any

from finetune_operator.core.objects import raw

Object = dict[str, Any]

_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
#: The most that Kubernetes takes.
_WEIGHT = 100


def avoid(pod_spec: Object, nodes: Sequence[str]) -> None:
    """Add to the pod that any other node is preferred to `nodes`, besides the affinity that it has.

    Preferred, not required: they may be the only ones, and repaired by then. By the node's name, as pods record it; the
    label kubernetes.io/hostname may be another name. Kubernetes allows one value for each requirement on a name.
    """
    if not nodes:
        return
    affinity = raw.mapping(pod_spec, "affinity")
    of_nodes = raw.mapping(affinity, "nodeAffinity")
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    # One preference: of two, each of two such nodes would meet one.
    elsewhere = {"weight": _WEIGHT, "preference": {"matchFields": fields}}
    preferred = [*raw.entries(of_nodes, _PREFERRED), elsewhere]
    pod_spec["affinity"] = {**affinity, "nodeAffinity": {**of_nodes, _PREFERRED: preferred}}
