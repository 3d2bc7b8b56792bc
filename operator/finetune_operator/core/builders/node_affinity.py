"""Keep an attempt away from nodes on which an earlier one found no GPU that works."""

from collections.abc import Sequence
from typing import Any

from finetune_operator.core.objects import raw

Object = dict[str, Any]

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def avoid(pod_spec: Object, nodes: Sequence[str]) -> None:
    """Add to the pod that none of `nodes` may run it, besides the affinity that it has.

    By the node's name, as pods record it; the label kubernetes.io/hostname may be another name. Kubernetes allows one
    value for each requirement on a name.
    """
    if not nodes:
        return
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    affinity = raw.mapping(pod_spec, "affinity")
    of_nodes = raw.mapping(affinity, "nodeAffinity")
    required = raw.mapping(of_nodes, _REQUIRED)
    # Terms are alternatives, so each needs it; an empty one matches no node, and must stay empty.
    terms = [
        {**term, "matchFields": [*raw.entries(term, "matchFields"), *fields]} if term else term
        for term in raw.entries(required, "nodeSelectorTerms")
    ]
    required = {**required, "nodeSelectorTerms": terms or [{"matchFields": fields}]}
    pod_spec["affinity"] = {**affinity, "nodeAffinity": {**of_nodes, _REQUIRED: required}}
