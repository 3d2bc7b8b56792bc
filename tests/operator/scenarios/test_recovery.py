"""Failed, lost, suspended and late attempts on a Kubernetes API (its trainer simulated)."""

import pytest

from finetune_api import constants
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs
from support.operator.process import OperatorProcess
from support.server.client import Kube, wait_until
from support.server.server import Cluster


def pod_of(kube: Kube, job: str, index: int = 0) -> str:
    """Name of the running pod of that Job."""

    def look() -> str | None:
        pods = kube.list("Pod", labelSelector=f"job-name={job}")
        running = [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]
        ranked = sorted(pod["metadata"]["name"] for pod in running if not pod["metadata"].get("deletionTimestamp"))
        return ranked[index] if len(ranked) > index else None

    return wait_until(look, f"a running pod of {job}", 60)


def test_retries_adaptation_and_their_story(operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    jobs.create("nli", "fail-69/oom/oom/succeed", training={"batchSize": 8, "microBatchSize": 8})
    assert jobs.wait_over("nli", 90)["status"] == "True"
    told = [(a["reason"], a["microBatchSize"], a["exitCode"]) for a in jobs.status("nli")["attempts"]]
    assert told == [("Unavailable", 8, 69), ("GpuOutOfMemory", 8, 90), ("GpuOutOfMemory", 4, 90), ("Succeeded", 2, 0)]


def test_the_attempts_are_used_up(operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    jobs.create("nli", "crash-3", recovery={"maxAttempts": 2, "backoffSeconds": 1})
    over = jobs.wait_over("nli", 90)
    assert (over["reason"], jobs.reasons("nli")) == ("TrainerCrashed", ["TrainerCrashed"] * 2)
    assert over["message"].startswith("2 of 2 attempts failed")
    assert "act crash: exit 3" in over["message"], "the last line of its log"


def test_a_node_without_a_gpu_that_works_is_avoided_and_taken_again_where_it_is_the_only_one(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    jobs.create("nli", "fail-92/run", recovery={"maxAttempts": 4, "backoffSeconds": 0})
    jobs.wait("nli", "Training", "True")
    first, second = jobs.status("nli")["attempts"]
    assert (first["reason"], first["exitCode"], first["node"]) == ("GpuUnavailable", 92, node.name)
    assert "reason" not in second
    pod = kube.get("Job", "nli-2")["spec"]["template"]["spec"]
    (preferred,) = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert preferred["preference"]["matchFields"][0]["values"] == [node.name]
    (variable,) = [each for each in pod["containers"][0]["env"] if each["name"] == constants.ENV_NODE]
    assert variable["valueFrom"]["fieldRef"]["fieldPath"] == "spec.nodeName"


def test_a_drained_pod_is_replaced_and_does_not_explain_how_its_replacement_ends(
    cluster: Cluster, operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    if not cluster.has_job_controller:
        pytest.skip("needs the real Job controller")
    jobs.create("nli", "run", recovery={"maxAttempts": 1, "backoffSeconds": 1})
    first = pod_of(kube, "nli-1")
    jobs.wait("nli", "Training", "True")
    node.drain(first)
    wait_until(lambda: (pod := pod_of(kube, "nli-1")) != first and pod, "its replacement", 60)
    jobs.wait("nli", "Training", "True")
    assert jobs.reasons("nli") == [None], "it is the same attempt"
    node.kill(pod_of(kube, "nli-1"))
    over = jobs.wait_over("nli", 90)
    assert (over["reason"], jobs.reasons("nli")) == ("Killed", ["Killed"])
    assert jobs.status("nli")["attempts"][0]["exitCode"] == 137


def test_a_deleted_pod_saves_a_checkpoint_and_its_attempt_does_not_count(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    jobs.create("nli", "run/succeed", recovery={"maxAttempts": 1, "backoffSeconds": 1})
    pod = pod_of(kube, "nli-1")
    jobs.wait("nli", "Training", "True")
    kube.delete("Pod", pod)
    assert jobs.wait_over("nli", 90)["status"] == "True"
    first, second = jobs.status("nli")["attempts"]
    assert (first["reason"], second["reason"]) == ("Preempted", "Succeeded")
    assert "saved a checkpoint" in first["message"]


def test_a_lost_node_does_not_count_simulated(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs, cluster: Cluster
):
    jobs.create("nli", "run", recovery={"maxAttempts": 1, "backoffSeconds": 1})
    node.simulate_node_loss(pod_of(kube, "nli-1"))
    wait_until(lambda: len(node.pids()) == 1 and jobs.condition("nli", "Training").get("status") == "True",
               "it trains elsewhere", 60)  # fmt: skip
    assert jobs.condition("nli", "Succeeded")["status"] == "Unknown"
    assert jobs.reasons("nli")[-1] is None


def test_host_memory_ran_out_simulated(operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs):
    jobs.create("nli", "run", resources={"gpusPerNode": 0, "memory": "64Mi"})
    node.simulate_oom_kill(pod_of(kube, "nli-1"))
    over = jobs.wait_over("nli")
    assert over["reason"] == "OOMKilled"
    assert "64Mi (resources.memory)" in over["message"]


def test_suspend_frees_the_node_and_resume_goes_on(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    jobs.create("nli", "run/succeed")
    pod = pod_of(kube, "nli-1")
    jobs.wait("nli", "Training", "True")
    jobs.change("nli", suspend=True)
    jobs.wait("nli", "Suspended", "True", "Suspended")
    assert node.pids() == []
    assert "exit 75" in node.logs(pod), "the trainer saved before it stopped"
    assert jobs.status("nli")["phase"] == "Suspended"
    step = jobs.status("nli")["progress"]["step"]
    jobs.change("nli", suspend=False)
    assert jobs.wait_over("nli")["status"] == "True"
    assert jobs.reasons("nli") == ["Suspended", "Succeeded"]
    assert jobs.status("nli")["progress"]["step"] >= step


def test_the_active_deadline_stops_a_run_also_when_set_while_it_runs(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    jobs.create("nli", "run")
    pod = pod_of(kube, "nli-1")
    jobs.change("nli", activeDeadlineSeconds=2)
    assert jobs.wait_over("nli")["reason"] == "DeadlineExceeded"
    wait_until(lambda: not node.pids(), "the trainer is stopped")
    assert "exit 75" in node.logs(pod)


def test_ttl_deletes_the_job_and_all_it_owned(operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs):
    jobs.create("nli", ttlSecondsAfterFinished=1)
    wait_until(lambda: kube.find("FineTuneJob", "nli") is None, "the job is gone", 60)
    wait_until(lambda: not kube.list("Job", labelSelector="finetune.dev/job=nli"), "its Job is gone", 60)


def test_deleting_mid_run_ends_with_a_checkpoint(operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs):
    jobs.create("nli", "run")
    pod = pod_of(kube, "nli-1")
    jobs.wait("nli", "Training", "True")
    kube.delete("FineTuneJob", "nli")
    wait_until(lambda: "exit 75" in node.logs(pod), "the trainer saved", 60)


def test_a_new_job_of_the_same_name_waits_for_the_old_ones_pods(
    operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    old = jobs.create("nli", "run")
    pod_of(kube, "nli-1")
    kube.delete("FineTuneJob", "nli")
    new = jobs.create("nli", "succeed")
    assert jobs.wait_over("nli", 90)["status"] == "True"
    assert old["metadata"]["uid"] != new["metadata"]["uid"]
    owner = kube.get("Job", "nli-1")["metadata"]["ownerReferences"][0]["uid"]
    assert owner == new["metadata"]["uid"]
    assert [a["jobName"] for a in jobs.status("nli")["attempts"]] == ["nli-1"]


def test_a_child_deleted_by_hand_is_replaced(operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs):
    jobs.create("nli", "run/succeed")
    pod_of(kube, "nli-1")
    kube.delete("Job", "nli-1", propagationPolicy="Background")
    assert jobs.wait_over("nli", 90)["status"] == "True"
    assert jobs.reasons("nli") == ["JobDeleted", "Succeeded"]


def test_a_pod_whose_node_falls_silent_is_waited_for_and_said_to_be_out_of_reach_simulated(
    cluster: Cluster, operator: OperatorProcess, node: ProcessNode, kube: Kube, jobs: Jobs
):
    """It was told to stop, and nobody knows whether it did: nothing new starts until Kubernetes gives the pod up, as
    it does when the node is deleted. Then the attempt goes on in another pod."""
    if not cluster.has_job_controller:
        pytest.skip("needs the real Job controller")
    jobs.create("nli", "run")
    pod = pod_of(kube, "nli-1")
    jobs.wait("nli", "Training", "True")
    node.simulate_silence(pod)
    kube.delete("Pod", pod, gracePeriodSeconds=1)
    said = jobs.wait("nli", "Scheduled", "False", "NodeUnreachable", seconds=60)
    assert f"Pod {pod} was due to stop by" in said["message"] and f"node {node.name}" in said["message"]
    wait_until(lambda: [e for e in jobs.events("nli") if e["reason"] == "NodeUnreachable"], "an event")
    assert [job["metadata"]["name"] for job in jobs.children("nli")] == ["nli-1"]
    assert len(kube.list("Pod", labelSelector="finetune.dev/job=nli")) == 1
    node.simulate_node_loss(pod)
    wait_until(lambda: (found := pod_of(kube, "nli-1")) != pod and found, "its replacement", 60)
    jobs.wait("nli", "Training", "True")
    assert jobs.reasons("nli") == [None]
