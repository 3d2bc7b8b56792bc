"""A node without a GPU that works costs one attempt, and the job goes elsewhere."""

import json
from typing import Any

import pytest

from finetune_api import exit_codes
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import Attempt
from finetune_operator.core.attempts.retry import Retry, decide_retry
from support.common import kubernetes_schema
from support.simulation.world import START, World

REPORT = {"stage": "Failed", "reason": "GpuUnavailable", "message": "no GPU is visible on node gpu-1"}
ZONE = {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a"]}
POOL = {"key": "pool", "operator": "In", "values": ["training"]}
SPREAD = {"topologyKey": "zone"}


def failed_on(world: World, *nodes: str, code: int = exit_codes.ExitCode.GPU_UNAVAILABLE) -> World:
    """Attempts end for the lack of a GPU on these nodes, one after the other."""
    for node in nodes:
        world.settle()
        world.start_pods()
        for name in world.live_pods():
            world.pods[name]["spec"]["nodeName"] = node
            world.changed("Pod", world.pods[name])
        world.settle()
        world.exit_pods(code, REPORT)
        world.settle()
        world.advance(700)
        world.settle()
    return world


def preferred(world: World) -> list[dict[str, Any]]:
    """The preferences of the latest attempt for nodes."""
    *_, job = world.jobs.values()
    of_nodes = job["spec"]["template"]["spec"].get("affinity", {}).get("nodeAffinity", {})
    assert "requiredDuringSchedulingIgnoredDuringExecution" not in of_nodes, "the node may be the only one"
    found: list[dict[str, Any]] = of_nodes.get("preferredDuringSchedulingIgnoredDuringExecution", [])
    return found


def avoided(world: World) -> list[str]:
    """The nodes to which the latest attempt prefers all others, as much as Kubernetes takes."""
    [one] = preferred(world)
    assert one["weight"] == 100
    term = one["preference"]
    assert {(each["key"], each["operator"]) for each in term["matchFields"]} == {("metadata.name", "NotIn")}
    assert all(len(each["values"]) == 1 for each in term["matchFields"]), "Kubernetes allows one for each requirement"
    return [each["values"][0] for each in term["matchFields"]]


@pytest.mark.parametrize("code", [exit_codes.ExitCode.GPU_UNAVAILABLE, 1], ids=["its own code", "below torchrun"])
def test_the_next_attempt_prefers_another_node(code: int) -> None:
    world = failed_on(World(), "gpu-1", code=code)
    assert world.reasons == ["GpuUnavailable", None]
    assert world.status["attempts"][0]["node"] == "gpu-1"
    assert avoided(world) == ["gpu-1"]
    assert avoided(failed_on(world, "gpu-2")) == ["gpu-1", "gpu-2"]


def test_it_is_counted_and_the_last_message_names_the_node() -> None:
    world = failed_on(World(recovery={"maxAttempts": 2}), "gpu-1", "gpu-2")
    assert (world.outcome, world.reasons) == ("False", ["GpuUnavailable"] * 2)
    assert world.condition("Succeeded")["message"] == f"2 of 2 attempts failed; the last: {REPORT['message']}"


def test_another_failure_says_nothing_of_its_node() -> None:
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    world.advance(700)
    world.settle()
    assert (world.reasons, preferred(world)) == (["Unavailable", None], [])


def test_a_node_stays_avoided_after_failures_of_another_kind() -> None:
    world = failed_on(World(), "gpu-1")
    world.start_pods()
    world.settle()
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    world.advance(700)
    world.settle()
    assert avoided(world) == ["gpu-1"]


def test_the_users_own_affinity_holds_as_well() -> None:
    required = {"nodeSelectorTerms": [{"matchExpressions": [ZONE]}, {"matchExpressions": [POOL]}]}
    preferred = [{"weight": 1, "preference": {"matchExpressions": [POOL]}}]
    affinity = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": required,
            "preferredDuringSchedulingIgnoredDuringExecution": preferred,
        },
        "podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [SPREAD]},
    }
    world = failed_on(World(resources={"affinity": affinity}), "gpu-1")
    job = json.loads(json.dumps(world.jobs["nli-2"]))
    made = job["spec"]["template"]["spec"]["affinity"]
    assert made["podAntiAffinity"] == affinity["podAntiAffinity"]
    of_nodes = made["nodeAffinity"]
    assert of_nodes["requiredDuringSchedulingIgnoredDuringExecution"] == required
    first, ours = of_nodes["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [first] == preferred
    assert ours["preference"]["matchFields"][0]["values"] == ["gpu-1"]
    kubernetes_schema.check({key: job[key] for key in ("apiVersion", "kind", "spec")})


def test_on_the_only_node_it_is_tried_again_until_the_attempts_are_used_up() -> None:
    world = failed_on(World(), "gpu-1", "gpu-1", "gpu-1", "gpu-1")
    assert (world.outcome, world.reasons) == ("False", ["GpuUnavailable"] * 4)


def test_coming_back_to_such_a_node_takes_the_longest_pause() -> None:
    """No other was free, and a node on which all fail at once always is."""
    attempts = [
        Attempt(job_name=f"nli-{number}", reason="GpuUnavailable", node=node, finished_at=START)
        for number, node in enumerate(("gpu-1", "gpu-2", "gpu-1"), start=1)
    ]
    uris = {
        "model": {"source": "hf://a/b"},
        "dataset": {"train": "s3://data/train.jsonl"},
        "output": {"uri": "s3://adapters/nli"},
    }
    pauses = []
    for count in (1, 2, 3):
        decision = decide_retry(attempts[:count], FineTuneJobSpec.model_validate(uris), "uid")
        assert isinstance(decision, Retry)
        pauses.append((decision.at - START).total_seconds())
    assert pauses[0] <= 11 and pauses[1] <= 22, "on another node the usual ones"
    assert 540 <= pauses[2] <= 660


NO_DEVICE = "Pod was rejected: Allocate failed due to no healthy devices present; cannot allocate unhealthy devices"
NO_CPU = "Pod was rejected: Allocate failed due to not enough cpus available to satisfy request, which is unexpected"
PRESSURE = "Pod was rejected: The node had condition: [DiskPressure]. "


@pytest.mark.parametrize(
    ("reason", "message", "ending", "avoids"),
    [
        ("UnexpectedAdmissionError", f"{NO_DEVICE} nvidia.com/gpu, which is unexpected", "GpuUnavailable", ["gpu-1"]),
        ("OutOfnvidia.com/gpu", "Pod was rejected: Node didn't have enough resource", "GpuUnavailable", ["gpu-1"]),
        ("UnexpectedAdmissionError", NO_CPU, "PodLost", []),
        ("OutOfmemory", "Pod was rejected: Node didn't have enough resource: memory", "PodLost", []),
        ("Evicted", PRESSURE, "PodLost", []),
    ],
)
def test_a_pod_that_the_kubelet_rejects_is_tried_again_and_elsewhere_if_a_device_failed(
    reason: str, message: str, ending: str, avoids: list[str]
) -> None:
    world = World()
    world.settle()
    world.start_pods()
    (name,) = world.live_pods()
    world.pods[name]["spec"]["nodeName"] = "gpu-1"
    world.pods[name]["status"] = {"phase": "Failed", "reason": reason, "message": message}
    world.changed("Pod", world.pods[name])
    world.conclude("Failed", "BackoffLimitExceeded")
    world.advance(60)
    world.settle()
    world.advance(60)
    world.settle()
    assert world.reasons == [ending, None]
    said = world.status["attempts"][0]["message"]
    assert f"{reason}: {message.strip().rstrip('.')}" in said
    assert (avoided(world) if avoids else preferred(world)) == avoids
    assert not avoids or f"pod {name} on node gpu-1" in said
