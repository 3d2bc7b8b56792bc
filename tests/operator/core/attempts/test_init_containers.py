"""Init containers, which webhooks and meshes add: why the trainer does not start, and how an attempt ends by them."""

from typing import Any

import pytest

from finetune_operator.core.attempts.failure import INIT_FAILED
from support.simulation.world import World, stamp

Object = dict[str, Any]
SIDECAR = {"name": "proxy", "restartPolicy": "Always"}


def at_init(world: World, *states: Object, phase: str = "Pending", specs: tuple[Object, ...] = ()) -> str:
    """The attempt's pod with these init containers; its name."""
    world.settle()
    name = world.make_pod(next(iter(world.jobs.values())))
    pod = world.pods[name]
    pod["spec"]["initContainers"] = list(specs)
    pod["status"] = {
        "phase": phase,
        "initContainerStatuses": [{"name": f"init-{number}", **state} for number, state in enumerate(states)],
        "containerStatuses": [{"name": "trainer", "state": {"waiting": {"reason": "PodInitializing"}}}],
    }
    world.changed("Pod", pod)
    world.settle()
    return name


def waiting(reason: str, message: str = "") -> Object:
    return {"state": {"waiting": {"reason": reason, "message": message}}}


def ended(code: int, message: str = "", reason: str = "Error", at: str = "2026-11-01T12:00:00Z") -> Object:
    return {"state": {"terminated": {"exitCode": code, "reason": reason, "message": message, "finishedAt": at}}}


RUNNING = {"state": {"running": {"startedAt": "2026-11-01T12:00:00Z"}}, "started": False}


def scheduled(world: World) -> tuple[str, str]:
    found = world.condition("Scheduled")
    return found["reason"], found["message"]


def test_an_init_container_that_waits_gives_the_kubelets_reason() -> None:
    world = World()
    at_init(world, ended(0), waiting("ImagePullBackOff", "Back-off pulling image mesh:1"), waiting("PodInitializing"))
    assert scheduled(world) == ("ImagePullBackOff", "init container init-1: Back-off pulling image mesh:1")


def test_an_init_container_that_runs_is_named() -> None:
    world = World()
    name = at_init(world, RUNNING)
    assert scheduled(world) == ("Pending", f"init container init-0 of pod {name} is running")


def test_a_sidecar_that_has_started_holds_nothing_up() -> None:
    world = World()
    at_init(world, RUNNING | {"started": True, "name": "proxy"}, waiting("CrashLoopBackOff"), specs=(SIDECAR,))
    assert scheduled(world) == ("CrashLoopBackOff", "init container init-1: CrashLoopBackOff")


def test_a_sidecar_that_does_not_start_is_named() -> None:
    world = World()
    at_init(world, waiting("CrashLoopBackOff") | {"name": "proxy", "started": False}, specs=(SIDECAR,))
    assert scheduled(world) == ("CrashLoopBackOff", "init container proxy: CrashLoopBackOff")


@pytest.mark.parametrize("are_removed", [False, True], ids=["its pod stays", "its pod is gone"])
def test_one_that_fails_ends_the_attempt_with_its_exit_code_and_last_lines(are_removed: bool) -> None:
    world = World()
    name = at_init(world, ended(0), ended(126, "line 1\niptables: Permission denied", at=stamp(world.now)))
    world.pods[name]["status"]["phase"] = "Failed"
    world.pods[name]["spec"]["nodeName"] = "node-7"
    world.changed("Pod", world.pods[name])
    if are_removed:
        world.lose_pods()
    else:
        world.conclude("Failed")
    world.settle()
    world.advance(10)
    world.settle()
    attempt = world.status["attempts"][0]
    assert (attempt["reason"], attempt.get("exitCode"), attempt["node"]) == (INIT_FAILED, None, "node-7")
    assert attempt["message"] == (
        f"init container init-1 of pod {name} ended with exit code 126\nline 1\niptables: Permission denied"
    )
    assert world.condition("Scheduled")["reason"] in ("BackingOff", "Pending"), "it is tried again"


def test_one_that_fails_is_counted() -> None:
    world = World(recovery={"maxAttempts": 1})
    name = at_init(world, ended(137, reason="OOMKilled"))
    world.pods[name]["status"]["phase"] = "Failed"
    world.changed("Pod", world.pods[name])
    world.conclude("Failed")
    world.settle()
    world.advance(10)
    world.settle()
    assert (world.outcome, world.reasons) == ("False", [INIT_FAILED])
    assert "ended with exit code 137 (OOMKilled)" in world.condition("Succeeded")["message"]


def test_what_an_init_container_says_is_nothing_once_the_trainer_has_run() -> None:
    world = World()
    world.settle()
    world.start_pods()
    (name,) = world.live_pods()
    world.pods[name]["status"]["initContainerStatuses"] = [{"name": "proxy", **ended(3)}]
    world.exit_pods(65)
    world.settle()
    assert world.reasons == ["DatasetInvalid"]


def test_one_that_was_stopped_with_its_pod_does_not_count() -> None:
    world = World(recovery={"maxAttempts": 1})
    name = at_init(world, RUNNING)
    world.stop_pods("nli-1")
    world.pods[name]["status"] |= {"phase": "Failed", "initContainerStatuses": [{"name": "init-0", **ended(143)}]}
    world.changed("Pod", world.pods[name])
    world.conclude("Failed")
    world.settle()
    world.advance(10)
    world.settle()
    assert (world.outcome, world.reasons[0]) == ("Unknown", "Preempted")
    assert world.status["attempts"][0]["message"] == "the pod was deleted while its init container init-0 ran"


@pytest.mark.parametrize("other", ["trains", "saves", "is at its init container"])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_fails_explains_why_the_job_stopped_the_other_rank(rank: int, other: str) -> None:
    world = World(resources={"nodes": 2})
    world.settle()
    world.start_pods()
    names = sorted(world.live_pods())
    failing, stopped = names[rank], names[1 - rank]
    for name, at_its_init in ((failing, True), (stopped, other == "is at its init container")):
        if at_its_init:
            world.pods[name]["status"] = {"phase": "Pending", "initContainerStatuses": [{"name": "init-0", **RUNNING}]}
            world.pods[name]["status"]["containerStatuses"] = [{"name": "trainer", **waiting("PodInitializing")}]
            world.changed("Pod", world.pods[name])
    world.settle()
    failed = {"name": "init-0", **ended(126, at=stamp(world.now))}
    world.pods[failing]["status"] |= {"phase": "Failed", "initContainerStatuses": [failed]}
    world.changed("Pod", world.pods[failing])
    world.advance(5)
    world.stop_pods("nli-1")
    if other == "is at its init container":
        killed = {"name": "init-0", **ended(143, at=stamp(world.now))}
        world.pods[stopped]["status"] |= {"phase": "Failed", "initContainerStatuses": [killed]}
        world.changed("Pod", world.pods[stopped])
    elif other == "saves":
        world.end_pod(stopped, 75, '{"stage": "Failed", "reason": "Preempted", "message": "saved"}')
    else:
        world.end_pod(stopped, 137)
    world.conclude("Failed")
    world.settle()
    world.advance(10)
    world.settle()
    assert world.reasons[0] == INIT_FAILED, world.status["attempts"][0]
    assert "init container init-0" in world.status["attempts"][0]["message"]
