"""The process node plays Job controller and kubelet as the real ones behave.

Every test runs on each kind of cluster that can run here. On "controllers" the Job controller is the real one, so these
tests are also the proof that the one played on the others does the same.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest

from support.node.node import ProcessNode
from support.server.client import Kube, Object, wait_until
from support.server.server import Cluster

SHELL = ["/bin/sh", "-c"]


def job(name: str, script: str, container: Object | None = None, pod: Object | None = None, **spec: Any) -> Object:
    main = {"name": "main", "image": "example.org/any:1", "command": SHELL, "args": [script]} | (container or {})
    template = {
        "spec": {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [main]} | (pod or {})
    }
    body = {"backoffLimit": 0, "template": template} | spec
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": body}


def condition(obj: Object, kind: str) -> Object:
    found = [c for c in (obj.get("status") or {}).get("conditions") or [] if c["type"] == kind]
    return found[0] if found else {}


def wait_for_job(kube: Kube, name: str, kind: str) -> Object:
    def look() -> Object | None:
        found = kube.get("Job", name)
        return found if condition(found, kind).get("status") == "True" else None

    return wait_until(look, f"Job {name} is {kind}")


def pods_of(kube: Kube, name: str) -> list[Object]:
    return kube.list("Pod", labelSelector=f"batch.kubernetes.io/job-name={name}")


def wait_for_pod(kube: Kube, name: str, phase: str, count: int = 1) -> list[Object]:
    def look() -> list[Object] | None:
        found = [pod for pod in pods_of(kube, name) if pod["status"]["phase"] == phase]
        return found if len(found) >= count else None

    return wait_until(look, f"{count} pods of Job {name} are {phase}")


def terminated(pod: Object) -> Object:
    return pod["status"]["containerStatuses"][0]["state"]["terminated"]


def test_a_job_that_succeeds(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("good", "echo hello; echo -n bye > /dev/termination-log"))
    done = wait_for_job(everywhere, "good", "Complete")
    assert condition(done, "SuccessCriteriaMet")["status"] == "True"
    assert done["status"]["succeeded"] == 1
    assert done["status"]["startTime"] <= done["status"]["completionTime"]
    [pod] = pods_of(everywhere, "good")
    assert pod["status"]["phase"] == "Succeeded"
    assert pod["status"]["podIP"].startswith("127.")
    assert not pod["metadata"].get("finalizers")
    ended = terminated(pod)
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (0, "Completed", "bye")
    assert node.logs(pod["metadata"]["name"]) == "hello\n"


def test_a_job_that_fails_says_how(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("bad", "echo -n 'no rows' > /dev/termination-log; exit 7"))
    done = wait_for_job(everywhere, "bad", "Failed")
    assert condition(done, "Failed")["reason"] == "BackoffLimitExceeded"
    assert condition(done, "FailureTarget")["reason"] == "BackoffLimitExceeded"
    assert done["status"]["failed"] == 1
    [pod] = pods_of(everywhere, "bad")
    ended = terminated(pod)
    assert (ended["exitCode"], ended["reason"], ended["message"]) == (7, "Error", "no rows")


def test_a_pod_failure_policy_ends_the_job_at_once(everywhere: Kube, node: ProcessNode):
    rule = {"action": "FailJob", "onExitCodes": {"containerName": "main", "operator": "In", "values": [65]}}
    everywhere.create(job("policy", "exit 65", backoffLimit=3, podFailurePolicy={"rules": [rule]}))
    done = wait_for_job(everywhere, "policy", "Failed")
    [pod] = pods_of(everywhere, "policy")
    found = condition(done, "Failed")
    assert found["reason"] == "PodFailurePolicy"
    place = f"{everywhere.namespace}/{pod['metadata']['name']}"
    assert (
        found["message"] == f"Container main for pod {place} failed with exit code 65 matching FailJob rule at index 0"
    )


def test_an_ignored_failure_is_replaced_and_not_counted(everywhere: Kube, node: ProcessNode):
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    policy = {"podFailurePolicy": {"rules": [rule]}, "podReplacementPolicy": "Failed"}
    everywhere.create(job("drained", "trap 'exit 75' TERM; while true; do sleep 0.05; done", **policy))
    [first] = wait_for_pod(everywhere, "drained", "Running")
    node.drain(first["metadata"]["name"])

    def replaced() -> list[Object]:
        return [
            p
            for p in wait_for_pod(everywhere, "drained", "Running")
            if p["metadata"]["uid"] != first["metadata"]["uid"]
        ]

    [second] = wait_until(replaced, "the drained pod is replaced")
    found = everywhere.get("Job", "drained")
    assert not condition(found, "Failed")
    assert not found["status"].get("failed")
    assert second["metadata"]["name"] != first["metadata"]["name"]


def test_a_lost_node_fails_the_pod_and_the_job_replaces_it_simulated(everywhere: Kube, node: ProcessNode):
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    policy = {"podFailurePolicy": {"rules": [rule]}, "podReplacementPolicy": "Failed"}
    everywhere.create(job("lost", "sleep 60", **policy))
    [first] = wait_for_pod(everywhere, "lost", "Running")
    [pid] = node.pids(first["metadata"]["name"])
    node.simulate_node_loss(first["metadata"]["name"])
    wait_until(
        lambda: [
            p for p in wait_for_pod(everywhere, "lost", "Running") if p["metadata"]["name"] != first["metadata"]["name"]
        ],
        "a new pod",
    )
    wait_until(lambda: not _alive(pid), "the lost pod's process is gone")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_process_is_137(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("killed", "sleep 60"))
    [pod] = wait_for_pod(everywhere, "killed", "Running")
    node.kill(pod["metadata"]["name"])
    wait_for_job(everywhere, "killed", "Failed")
    ended = terminated(pods_of(everywhere, "killed")[0])
    assert (ended["exitCode"], ended["reason"]) == (137, "Error")


def test_out_of_memory_is_reported_as_the_kernel_would_simulated(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("oom", "sleep 60"))
    [pod] = wait_for_pod(everywhere, "oom", "Running")
    node.simulate_oom_kill(pod["metadata"]["name"])
    wait_for_job(everywhere, "oom", "Failed")
    ended = terminated(pods_of(everywhere, "oom")[0])
    assert (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")


def test_volumes_and_variables_are_the_pods(everywhere: Kube, node: ProcessNode):
    everywhere.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a.txt": "config"}})
    everywhere.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"KEY": "hush"}})
    claim = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    everywhere.create(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "data"}, "spec": claim}
    )
    (node.claim_folder("data") / "rows.txt").write_text("rows")
    read = "cat /etc/conf/a.txt $SECRETS/one/KEY /mnt/data/rows.txt"
    script = f"{read}; echo $FROM $WHO $LISTEN $IP; cp /etc/conf/a.txt /scratch/x"
    field = {"name": "WHO", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}}
    container = {
        "env": [
            {"name": "SECRETS", "value": "/var/run/secrets/all"},
            {"name": "FROM", "valueFrom": {"secretKeyRef": {"name": "s", "key": "KEY"}}},
            {"name": "LISTEN", "value": "0.0.0.0:9400"},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            field,
        ],
        "args": [script],
        "volumeMounts": [
            {"name": "conf", "mountPath": "/etc/conf"},
            {"name": "sec", "mountPath": "/var/run/secrets/all/one"},
            {"name": "data", "mountPath": "/mnt/data"},
            {"name": "scratch", "mountPath": "/scratch"},
        ],
    }
    volumes = [
        {"name": "conf", "configMap": {"name": "c"}},
        {"name": "sec", "secret": {"secretName": "s"}},
        {"name": "data", "persistentVolumeClaim": {"claimName": "data"}},
        {"name": "scratch", "emptyDir": {}},
    ]
    everywhere.create(job("files", script, container, {"volumes": volumes}))
    wait_for_job(everywhere, "files", "Complete")
    [pod] = pods_of(everywhere, "files")
    address = pod["status"]["podIP"]
    assert node.logs(pod["metadata"]["name"]) == f"confighushrowshush files {address}:9400 {address}\n"


def test_a_missing_secret_in_a_volume_is_an_event_and_mends_itself(everywhere: Kube, node: ProcessNode):
    volumes = [{"name": "sec", "secret": {"secretName": "late"}}]
    mounts = {"volumeMounts": [{"name": "sec", "mountPath": "/etc/late"}]}
    everywhere.create(job("late", "cat /etc/late/KEY", mounts, {"volumes": volumes}))

    def told() -> list[Object]:
        return everywhere.list("Event", fieldSelector="reason=FailedMount,involvedObject.kind=Pod")

    [event] = wait_until(told, "an event says what is missing")
    assert event["message"] == 'MountVolume.SetUp failed for volume "sec" : secret "late" not found'
    [pod] = pods_of(everywhere, "late")
    assert pod["status"]["containerStatuses"][0]["state"]["waiting"]["reason"] == "ContainerCreating"
    everywhere.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "late"}, "stringData": {"KEY": "here"}}
    )
    wait_for_job(everywhere, "late", "Complete")


def test_a_missing_secret_in_a_variable_is_a_config_error(everywhere: Kube, node: ProcessNode):
    env = {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "none", "key": "KEY"}}}]}
    everywhere.create(job("unset", "true", env))

    def waiting() -> Object | None:
        pods = pods_of(everywhere, "unset")
        statuses = pods[0]["status"].get("containerStatuses") if pods else None
        found = statuses[0]["state"].get("waiting") if statuses else None
        return found if found and found["reason"] == "CreateContainerConfigError" else None

    assert wait_until(waiting, "the container waits")["message"] == 'secret "none" not found'


def test_why_a_pod_is_not_scheduled_simulated(everywhere: Kube, node: ProcessNode):
    sentence = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    node.simulate_unschedulable(sentence)
    everywhere.create(job("big", "true"))

    def said() -> str | None:
        return next((condition(pod, "PodScheduled").get("message") for pod in pods_of(everywhere, "big")), None)

    assert wait_until(said, "the scheduler says why") == sentence
    node.simulate_unschedulable(None)
    wait_for_job(everywhere, "big", "Complete")


def test_deleting_a_job_stops_its_process(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("gone", "trap 'echo stopped; exit 0' TERM; echo started; while true; do sleep 0.05; done"))
    [pod] = wait_for_pod(everywhere, "gone", "Running")
    name = pod["metadata"]["name"]
    wait_until(lambda: "started" in node.logs(name), "it started")
    [pid] = node.pids(name)
    everywhere.delete("Job", "gone", propagationPolicy="Background")
    wait_until(lambda: not everywhere.find("Pod", name), "the pod is gone")
    assert not _alive(pid)
    assert node.logs(name) == "started\nstopped\n"


@pytest.mark.parametrize("placed", [True, False], ids=["waiting on its node", "waiting for a node simulated"])
def test_a_pod_that_never_started_ends_with_its_job(everywhere: Kube, node: ProcessNode, placed: bool):
    if not placed:
        node.simulate_unschedulable("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")
    env = {"env": [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "none", "key": "KEY"}}}]}
    rule = {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    everywhere.create(job("never", "true", env, activeDeadlineSeconds=2, podFailurePolicy={"rules": [rule]}))
    found = wait_for_job(everywhere, "never", "Failed")
    assert condition(found, "Failed")["reason"] == "DeadlineExceeded"
    wait_until(lambda: not pods_of(everywhere, "never"), "the pod is gone")


def test_a_process_that_ignores_sigterm_is_killed_after_its_grace_period(everywhere: Kube, node: ProcessNode):
    everywhere.create(
        job(
            "deaf",
            "trap '' TERM; echo started; while true; do sleep 0.05; done",
            pod={"terminationGracePeriodSeconds": 1},
        )
    )
    [pod] = wait_for_pod(everywhere, "deaf", "Running")
    wait_until(lambda: "started" in node.logs(pod["metadata"]["name"]), "it started")
    [pid] = node.pids()
    everywhere.delete("Job", "deaf", propagationPolicy="Foreground")
    wait_until(lambda: not everywhere.find("Job", "deaf"), "the Job is gone")
    assert not _alive(pid)


def test_suspend_stops_the_pod_uncounted_and_resume_starts_another(everywhere: Kube, node: ProcessNode):
    script = "trap 'exit 75' TERM; while true; do sleep 0.05; done"
    everywhere.create(job("pause", script, podReplacementPolicy="Failed"))
    [pod] = wait_for_pod(everywhere, "pause", "Running")
    [pid] = node.pids()
    everywhere.patch("Job", "pause", {"spec": {"suspend": True}})
    suspended = wait_for_job(everywhere, "pause", "Suspended")
    assert condition(suspended, "Suspended")["reason"] == "JobSuspended"
    wait_until(lambda: not pods_of(everywhere, "pause"), "the pod is gone")
    assert not _alive(pid)
    everywhere.patch("Job", "pause", {"spec": {"suspend": False}})
    [second] = wait_for_pod(everywhere, "pause", "Running")
    assert second["metadata"]["uid"] != pod["metadata"]["uid"]
    resumed = everywhere.get("Job", "pause")
    assert condition(resumed, "Suspended")["reason"] == "JobResumed"
    assert not resumed["status"].get("failed")


def test_created_suspended_means_no_pod_until_resumed(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("queued", "true", suspend=True))
    wait_for_job(everywhere, "queued", "Suspended")
    assert pods_of(everywhere, "queued") == []
    everywhere.patch("Job", "queued", {"spec": {"suspend": False}})
    wait_for_job(everywhere, "queued", "Complete")


def test_indexed_pods_know_their_rank_and_find_each_other(everywhere: Kube, node: ProcessNode):
    env = [
        {"name": "LEADER", "value": "pair-0.nodes:29500"},
        {
            "name": "RANK",
            "valueFrom": {
                "fieldRef": {"fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}
            },
        },
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    parallel = {"completions": 2, "parallelism": 2, "completionMode": "Indexed"}
    body = job("pair", "echo $RANK $JOB_COMPLETION_INDEX $LEADER $IP", {"env": env}, {"subdomain": "nodes"}, **parallel)
    everywhere.create(body)
    done = wait_for_job(everywhere, "pair", "Complete")
    assert done["status"]["completedIndexes"] in ("0,1", "0-1")
    lines = dict(node.logs(p["metadata"]["name"]).split(" ", 1) for p in pods_of(everywhere, "pair"))
    leader = lines["0"].split()[-1]
    assert lines["0"].split() == ["0", f"{leader}:29500", leader]
    assert lines["1"].split()[:2] == ["1", f"{leader}:29500"]
    assert lines["1"].split()[2] != leader


def test_the_pods_of_each_job_have_a_rendezvous_port_to_themselves(everywhere: Kube, node: ProcessNode):
    """torch's store listens on every address of the machine: beside a second job on port 29500 it would not start."""
    parallel = {"completions": 2, "parallelism": 2, "completionMode": "Indexed"}
    container = {"env": [{"name": "PET_MASTER_PORT", "value": "29500"}]}
    ports = {}
    for name in ("one", "other"):
        everywhere.create(job(name, "echo $PET_MASTER_PORT", container, {"subdomain": "nodes"}, **parallel))
        wait_for_job(everywhere, name, "Complete")
        ports[name] = {node.logs(pod["metadata"]["name"]).strip() for pod in pods_of(everywhere, name)}
    assert [len(each) for each in ports.values()] == [1, 1]
    assert ports["one"] != ports["other"]


def test_a_deadline_ends_the_job(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("slow", "sleep 60", activeDeadlineSeconds=1))
    done = wait_for_job(everywhere, "slow", "Failed")
    assert condition(done, "Failed")["reason"] == "DeadlineExceeded"
    wait_until(lambda: not node.pids(), "its process ended")


def test_a_command_that_does_not_exist_fails_the_pod(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("typo", "", {"command": ["no-such-program"], "args": []}))
    wait_for_job(everywhere, "typo", "Failed")
    [pod] = pods_of(everywhere, "typo")
    assert "no-such-program" in terminated(pod)["message"]


def test_a_quota_that_refuses_pods_is_the_jobs_event(every_cluster: Cluster, everywhere: Kube, node: ProcessNode):
    if not every_cluster.is_real:
        pytest.skip("the stand-in has no admission")
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}}
    everywhere.create(quota)
    used = {"status": {"hard": {"pods": "0"}, "used": {"pods": "0"}}}  # a controller's work where one runs
    everywhere.patch("ResourceQuota", "none", used, subresource="status")
    everywhere.create(job("many", "true"))

    def told() -> list[Object]:
        return everywhere.list("Event", fieldSelector="reason=FailedCreate,involvedObject.kind=Job")

    assert "exceeded quota: none" in wait_until(told, "an event says why")[0]["message"]
    everywhere.delete("ResourceQuota", "none")
    wait_for_job(everywhere, "many", "Complete")


def test_logs_are_served_through_the_api(everywhere: Kube, node: ProcessNode):
    everywhere.create(job("talk", "echo one; echo two; while [ ! -e go ]; do sleep 0.05; done; echo three"))
    [pod] = wait_for_pod(everywhere, "talk", "Running")
    name = pod["metadata"]["name"]
    wait_until(lambda: "two" in node.logs(name), "it spoke")
    path = f"/api/v1/namespaces/{everywhere.namespace}/pods/{name}/log"
    assert everywhere.request("GET", path) == "one\ntwo\n"
    assert everywhere.request("GET", path, params={"tailLines": 1}) == "two\n"
    (node.folder / "pods" / f"{everywhere.namespace}_{name}" / "go").touch()
    assert everywhere.request("GET", path, params={"follow": "true"}) == "one\ntwo\nthree\n"
    wait_for_job(everywhere, "talk", "Complete")
    assert everywhere.request("GET", path) == "one\ntwo\nthree\n"


@pytest.fixture(autouse=True)
def no_process_is_left(node: ProcessNode) -> Iterator[None]:
    yield
    pids = node.pids()
    node.__exit__(None, None, None)
    wait_until(lambda: not any(map(_alive, pids)), "every process ended with the node")
    node.__enter__()
