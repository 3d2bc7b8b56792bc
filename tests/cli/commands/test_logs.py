"""logs: from the pod while there is one, from the store afterwards, or a sentence that says why there is none."""

import json
import sys

import pytest

from support.cli.run import FINETUNE
from support.common.processes import Process
from support.node.node import ProcessNode
from support.server.client import wait_until
from support.simulation import job_states as states

#: Prints what the trainer prints, waits for a file named "go", and ends.
PROGRAM = """
import json, pathlib, sys, time
number, exit_code = int(sys.argv[2]), int(sys.argv[3])
def say(event, **more):
    line = {"event": event, "level": "info", "timestamp": "2026-01-01T12:03:11Z", **more}
    print(json.dumps(line), flush=True)
say(f"attempt {number}")
for step, loss in ((10, "2.4"), (20, "1.2"), (30, "0.6")): say(f"Step {step}", loss=loss)
while not pathlib.Path(sys.argv[1], f"go-{number}").exists(): time.sleep(0.05)
say(f"end of attempt {number}")
sys.exit(exit_code)
"""


@pytest.fixture
def node(cluster, namespace, tmp_path):
    """A node whose pods' logs the API server serves."""
    with ProcessNode(cluster, namespace, tmp_path) as running:
        yield running


@pytest.fixture
def attempt(kube, tmp_path, node):
    """Start an attempt of job nli as the operator would: a Job with our labels. Waits for its log."""

    def start(number, exit_code=0):
        labels = {"finetune.dev/job": "nli", "finetune.dev/attempt": str(number)}
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(number), str(exit_code)]
        container = {"name": "trainer", "image": "trainer", "command": command}
        template = {"metadata": {"labels": labels}, "spec": {"restartPolicy": "Never", "containers": [container]}}
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": f"nli-{number}", "labels": labels}}
        kube.create(job | {"spec": {"backoffLimit": 0, "template": template}})

        def is_ready():
            pods = kube.list("Pod", labelSelector=f"finetune.dev/attempt={number}")
            return pods and pods[0].get("status", {}).get("phase") == "Running" and "Step 30" in node.all_logs()

        wait_until(is_ready, "the attempt is running")

    return start


def test_the_log_of_a_running_pod_is_shown_for_people(ctl, put, attempt):
    put(states.job("nli"), states.training())
    attempt(1)
    assert ctl("logs", "nli").stdout.splitlines() == [
        "12:03:11  attempt 1",
        "12:03:11  Step 10     loss  2.4000",
        "12:03:11  Step 20     loss  1.2000",
        "12:03:11  Step 30     loss  0.6000",
    ]
    assert ctl("logs", "nli", "--tail", "1").stdout == "12:03:11  Step 30     loss  0.6000\n"
    raw = [json.loads(line) for line in ctl("logs", "nli", "--raw").stdout.splitlines()]
    assert raw[1]["loss"] == "2.4"


def test_status_draws_the_loss_of_a_running_pod(ctl, put, attempt):
    put(states.job("nli"), states.training())
    attempt(1)
    assert "loss █▃▁  2.4000 → 0.6000" in ctl("status", "nli").stdout


def test_each_attempt_has_its_log_the_newest_unless_asked(ctl, put, attempt, tmp_path, kube):
    put(states.job("nli"), states.training())
    attempt(1, exit_code=1)
    (tmp_path / "go-1").touch()
    wait_until(lambda: kube.get("Job", "nli-1")["status"].get("failed"), "the first attempt has ended")
    attempt(2)
    assert "attempt 2" in ctl("logs", "nli").stdout
    first = ctl("logs", "nli", "--attempt", "1").stdout
    assert "end of attempt 1" in first
    assert "attempt 2" not in first
    result = ctl("logs", "nli", "--attempt", "7")
    assert result.returncode == 1
    assert "nli has no attempt 7: there were 2" in result.stderr


@pytest.mark.parametrize(("exit_code", "status"), [(0, "succeeded"), (2, "failed")])
def test_following_goes_from_attempt_to_attempt_and_ends_with_the_job(
    cluster, namespace, put, attempt, kube, tmp_path, exit_code, status
):
    put(states.job("nli"), states.training())
    attempt(1, exit_code=75)
    arguments = [FINETUNE, "logs", "-f", "nli", "-n", namespace, "--kubeconfig", cluster.kubeconfig]
    process = Process(arguments, tmp_path / "followed")
    try:
        wait_until(lambda: "Step 30" in process.output(), "the first lines are shown")
        (tmp_path / "go-1").touch()
        wait_until(lambda: "end of attempt 1" in process.output(), "the first attempt's end is shown")
        attempt(2)
        wait_until(lambda: "attempt 2" in process.output(), "the second attempt's log is shown")
        (tmp_path / "go-2").touch()
        wait_until(lambda: "end of attempt 2" in process.output(), "the second attempt's end is shown")
        assert process.returncode is None
        ended = states.succeeded("s3://a/b") if status == "succeeded" else states.failed("Diverged", "NaN", 91)
        kube.patch("FineTuneJob", "nli", {"status": ended}, subresource="status")
        wait_until(lambda: process.returncode is not None, "it ends with the job")
    finally:
        process.kill()
    assert process.returncode == exit_code
    assert process.output().count("Step 30") == 2


def test_once_the_pod_is_gone_the_log_comes_from_the_store(ctl, put, s3, bucket):
    s3.client().put_object(Bucket=bucket, Key="nli/training/log.txt", Body=b"first line\nsecond line\n")
    put(states.job("nli"), states.succeeded(f"s3://{bucket}/nli"))
    assert ctl("logs", "nli", env=s3.env).stdout == "first line\nsecond line\n"
    assert ctl("logs", "nli", "--tail", "1", env=s3.env).stdout == "second line\n"


def test_a_job_that_waits_has_no_log_yet_and_says_why(ctl, put):
    put(states.job("nli"), states.waiting("0/8 nodes are available."))
    result = ctl("logs", "nli")
    assert result.returncode == 1
    assert "nli has no log yet (Pending): 0/8 nodes are available." in result.stderr


def test_a_failed_job_without_a_pod_has_its_last_word(ctl, put):
    put(states.job("nli"), states.failed("DatasetInvalid", "train.jsonl line 17: no column text", 65))
    result = ctl("logs", "nli")
    assert result.returncode == 1
    assert "its log with it. Its last word: train.jsonl line 17: no column text" in result.stderr
