"""A node without a GPU that works costs one attempt, and the job goes elsewhere."""

import json
from typing import Any

import kubernetes_validate
import pytest

from finetune_api import exit_codes
from support.simulation.world import World

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


def terms(world: World) -> list[dict[str, Any]]:
    """The node selector terms of the latest attempt."""
    *_, job = world.jobs.values()
    affinity = job["spec"]["template"]["spec"].get("affinity", {})
    required = affinity.get("nodeAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution", {})
    return required.get("nodeSelectorTerms", [])


def left_out(term: dict[str, Any]) -> list[str]:
    assert {(each["key"], each["operator"]) for each in term["matchFields"]} == {("metadata.name", "NotIn")}
    assert all(len(each["values"]) == 1 for each in term["matchFields"]), "Kubernetes allows one for each requirement"
    return [each["values"][0] for each in term["matchFields"]]


@pytest.mark.parametrize("code", [exit_codes.ExitCode.GPU_UNAVAILABLE, 1], ids=["its own code", "below torchrun"])
def test_the_next_attempt_runs_on_another_node(code: int) -> None:
    world = failed_on(World(), "gpu-1", code=code)
    assert world.reasons == ["GpuUnavailable", None]
    assert world.status["attempts"][0]["node"] == "gpu-1"
    assert [left_out(term) for term in terms(world)] == [["gpu-1"]]
    assert [left_out(term) for term in terms(failed_on(world, "gpu-2"))] == [["gpu-1", "gpu-2"]]


def test_it_is_counted_and_the_last_message_names_the_node() -> None:
    world = failed_on(World(recovery={"maxAttempts": 2}), "gpu-1", "gpu-2")
    assert (world.outcome, world.reasons) == ("False", ["GpuUnavailable"] * 2)
    assert world.condition("Succeeded")["message"] == f"2 of 2 attempts failed; the last: {REPORT['message']}"


def test_another_failure_does_not_rule_its_node_out() -> None:
    world = World()
    world.settle()
    world.start_pods()
    world.settle()
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    world.advance(700)
    world.settle()
    assert (world.reasons, terms(world)) == (["Unavailable", None], [])


def test_a_node_stays_ruled_out_after_failures_of_another_kind() -> None:
    world = failed_on(World(), "gpu-1")
    world.start_pods()
    world.settle()
    world.exit_pods(exit_codes.ExitCode.UNAVAILABLE)
    world.settle()
    world.advance(700)
    world.settle()
    assert [left_out(term) for term in terms(world)] == [["gpu-1"]]


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
    assert [term["matchExpressions"] for term in terms(world)] == [[ZONE], [POOL]]
    assert [left_out(term) for term in terms(world)] == [["gpu-1"]] * 2, "terms are alternatives"
    job = json.loads(json.dumps(world.jobs["nli-2"]))
    made = job["spec"]["template"]["spec"]["affinity"]
    assert made["podAntiAffinity"] == affinity["podAntiAffinity"]
    assert made["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] == preferred
    kubernetes_validate.validate({key: job[key] for key in ("apiVersion", "kind", "spec")}, "1.34", strict=True)


def test_waiting_for_another_node_says_which_are_ruled_out() -> None:
    world = failed_on(World(), "gpu-1")
    name = world.make_pod(world.jobs["nli-2"])
    said = "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
    unschedulable = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    world.pods[name]["status"] = {"phase": "Pending", "conditions": [unschedulable]}
    world.changed("Pod", world.pods[name])
    world.settle()
    assert world.condition("Scheduled")["message"] == f"{said}; left out after GpuUnavailable: gpu-1"
