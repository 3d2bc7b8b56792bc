"""The operator as a process against a Kubernetes API: the whole way, plain failures, and what it says of itself.

The trainer's process is a simulated one; tests/integration runs the real one.
"""

from collections import Counter

import pytest
import yaml

from finetune_api import constants, exit_codes
from support.node.node import ProcessNode
from support.operator.fixtures import Jobs
from support.operator.process import OperatorProcess
from support.server.client import Kube, wait_until


def test_a_job_goes_from_its_manifest_to_an_adapter(operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    jobs.create("nli")
    jobs.wait("nli", "Training", "True")
    jobs.wait_over("nli")
    status = jobs.status("nli")
    assert status["phase"] == "Succeeded"
    assert status["adapter"]["uri"] == "s3://adapters/nli"
    assert status["metrics"] == {"trainLoss": 0.5, "evalLoss": 0.6}
    assert status["progress"]["summary"] == "20/20"
    assert status["attempts"][0] | {"exitCode": 0, "reason": "Succeeded"} == status["attempts"][0]
    holds = {c["type"] for c in status["conditions"] if c["status"] == "True"}
    assert holds == {"Accepted", "Published", "Succeeded", "Finished"}


def test_the_trainer_reads_exactly_the_resolved_manifest(operator: OperatorProcess, kube: Kube, jobs: Jobs):
    made = jobs.create("nli")
    job = wait_until(lambda: kube.find("Job", "nli-1"), "the Job")
    resolved = yaml.safe_load(job["spec"]["template"]["metadata"]["annotations"][constants.ANNOTATION_MANIFEST])
    assert resolved["metadata"]["uid"] == made["metadata"]["uid"]
    assert resolved["spec"]["lora"]["rank"] == 16, "defaults are written out"


def test_events_tell_each_step_once(operator: OperatorProcess, node: ProcessNode, jobs: Jobs):
    jobs.create("nli", "fail-69/succeed")
    jobs.wait_over("nli")
    wait_until(lambda: "Succeeded" in {event["reason"] for event in jobs.events("nli")}, "the last event")
    told = Counter(event["reason"] for event in jobs.events("nli"))
    wanted = {"AttemptStarted": 2, "PodsRunning": 2, "Training": 1, "AttemptEnded": 1, "Succeeded": 1}
    seen = {reason: told[reason] for reason in ("AttemptStarted", "AttemptEnded", "Succeeded")}
    assert seen.items() <= wanted.items()
    assert all(count <= wanted[reason] for reason, count in told.items()), (
        "running may pass unseen; nothing is told twice"
    )


@pytest.mark.parametrize("code", exit_codes.FINAL_EXIT_CODES)
def test_a_users_mistake_ends_the_job_with_its_reason(
    code: int, operator: OperatorProcess, node: ProcessNode, jobs: Jobs
):
    jobs.create("nli", f"fail-{code}")
    over = jobs.wait_over("nli")
    assert (over["status"], over["reason"]) == ("False", exit_codes.OUTCOMES[code].reason)
    assert over["message"] == f"simulated exit {code}"
    assert jobs.status("nli")["attempts"][0]["exitCode"] == code


def test_a_name_in_use_by_someone_else_is_said_and_waited_for(operator: OperatorProcess, kube: Kube, jobs: Jobs):
    template = {"spec": {"restartPolicy": "Never", "containers": [{"name": "mine", "image": "mine"}]}}
    spec = {"suspend": True, "template": template}
    kube.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "nli-1"}, "spec": spec})
    jobs.create("nli")
    said = jobs.wait("nli", "Scheduled", "False", "NameConflict")
    assert "Job nli-1 exists already" in said["message"]
    assert kube.get("Job", "nli-1")["spec"]["template"]["spec"]["containers"][0]["name"] == "mine"
    kube.delete("Job", "nli-1", propagationPolicy="Background")
    jobs.wait("nli", "Scheduled", "False", "Pending")
