"""Events as Kubernetes' own components post them."""

from typing import Any

from support.node.container import now
from support.server.client import AsyncKube, path_of

Object = dict[str, Any]


async def post_event(kube: AsyncKube, about: Object, kind: str, reason: str, message: str, component: str) -> None:
    """Post a core/v1 Event about an object; `kind` is Normal or Warning."""
    metadata = about["metadata"]
    place = {key: metadata[key] for key in ("namespace", "name", "uid")}
    event = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": {"apiVersion": about["apiVersion"], "kind": about["kind"], **place},
        "type": kind,
        "reason": reason,
        "message": message,
        "source": {"component": component},
        "reportingComponent": component,
        "firstTimestamp": now(),
        "lastTimestamp": now(),
        "count": 1,
    }
    await kube.request("POST", path_of("Event", metadata["namespace"]), event)
