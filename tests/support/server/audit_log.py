"""What the operator's account may do, what it did by the API server's audit log, and jobs that make it do things."""

from typing import Any

from finetune_api import constants
from support.server.client import Object
from support.server.server import Cluster

#: (group, resource, verb)
Right = tuple[str, str, str]
#: The ServiceAccount of the chart's release under test.
ACCOUNT = "tune-finetune-operator"


def rights(rules: list[Object]) -> set[Right]:
    """(group, resource, verb) of every rule."""
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def job(name: str, story: str, **spec: Any) -> Object:
    """A FineTuneJob for fake_trainer, which plays `story`."""
    return {
        "apiVersion": constants.API_VERSION,
        "kind": constants.KIND,
        "metadata": {"name": name},
        "spec": {
            "model": {"source": "hf://example/model"},
            "dataset": {"train": f"s3://simulated/{story}"},
            "output": {"uri": f"s3://adapters/{name}"},
            "resources": {"gpusPerNode": 0},
            "recovery": {"backoffSeconds": 0},
            **spec,
        },
    }


def resource_of(event: Object) -> str:
    """The plural, with its subresource."""
    ref = event["objectRef"]
    return "/".join(filter(None, (ref["resource"], ref.get("subresource"))))


def used(events: list[Object]) -> set[Right]:
    """The rights that requests needed, refused ones included."""
    found = set()
    for event in events:
        ref = event["objectRef"]
        found.add((ref.get("apiGroup", ""), resource_of(event), event["verb"]))
    return found


def about_resources(cluster: Cluster, namespace: str, *others: str) -> list[Object]:
    """The account's audited requests in its own `namespace`, in `others` and of the whole cluster; not those for
    discovery, which every user may make, nor those in namespaces of earlier tests that are still being terminated."""
    found = cluster.audited(f"system:serviceaccount:{namespace}:{ACCOUNT}")
    judged = (namespace, *others, None)
    return [event for event in found if "objectRef" in event and event["objectRef"].get("namespace") in judged]


def refused(events: list[Object]) -> list[tuple[str, Object]]:
    """Verb and object of the requests that RBAC turned down."""
    return [(e["verb"], e["objectRef"]) for e in events if e["responseStatus"]["code"] in (401, 403)]
