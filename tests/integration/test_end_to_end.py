"""A FineTuneJob is applied; the adapter lies verified in S3, or the status says why not. Every part is the real one:

operator process, trainer process, S3 server with IAM, and the API server that the report names. Only the kubelet (and,
without a controller manager, the Job controller) is played, by the process node.
"""

import os
import threading
from pathlib import Path

import pytest
import yaml

from finetune_api import constants
from finetune_api.status import FineTuneJobStatus
from support.common.processes import free_port
from support.installation.installation import SECRET, Stage, verify_digests
from support.installation.secret_scanner import CANARIES, check_that_no_secret_shows
from support.server.client import Kube, Object, wait_until
from support.server.server import ROOT

QUICKSTART = ROOT / "examples" / "quickstart" / "finetunejob.yaml"


class Recorder(threading.Thread):
    """Watches one job and keeps every status it had, until it is over."""

    def __init__(self, kube: Kube, name: str) -> None:
        super().__init__(daemon=True)
        self.statuses: list[Object] = []
        self._kube, self._name = Kube(kube.access, kube.namespace), name
        self.start()

    def run(self) -> None:
        for event in self._kube.watch(constants.KIND, seconds=300, fieldSelector=f"metadata.name={self._name}"):
            status = event["object"].get("status")
            if status:
                self.statuses.append(status)
            if (status or {}).get("completionTime"):
                return

    def seen(self, key: str) -> list[str]:
        """The values that a field of the status had, in order, without repetitions."""
        self.join(30)
        values = [status[key] for status in self.statuses if key in status]
        return [value for place, value in enumerate(values) if place == 0 or values[place - 1] != value]


def test_an_applied_job_ends_as_a_verified_adapter(stage: Stage, tmp_path: Path):
    stage.secret(**CANARIES)
    with stage.operator(log_level="debug") as operator:
        recorder = Recorder(stage.kube, "nli")
        stage.kube.apply(stage.manifest())
        stage.wait_for("Succeeded", "True")
        status = stage.get()["status"]
        metrics = operator.get("/metrics").text
    parsed = FineTuneJobStatus.model_validate(status)
    assert parsed.phase == "Succeeded"
    assert parsed.observed_generation == 1
    assert parsed.completion_time
    assert [attempt.reason for attempt in parsed.attempts] == ["Succeeded"]
    assert parsed.attempts[0].exit_code == 0
    assert parsed.progress
    assert (parsed.progress.step, parsed.progress.total_steps) == (6, 6)
    assert parsed.metrics
    assert {"trainLoss", "evalLoss", "evalLossBefore"} <= set(parsed.metrics)
    assert parsed.metrics["evalLoss"] < parsed.metrics["evalLossBefore"]
    phases = recorder.seen("phase")
    assert phases[-1] == "Succeeded"
    assert {"Pending", "Training"} <= set(phases), phases
    assert "finetune_operator" in metrics
    _check_adapter(stage, parsed, tmp_path / "adapter")
    _check_events(stage)
    check_that_no_secret_shows(stage, metrics)


def _check_adapter(stage: Stage, status: FineTuneJobStatus, folder: Path) -> None:
    """Every byte is what manifest.json says, and PEFT loads it."""
    assert status.adapter
    assert status.adapter.uri == f"s3://{stage.bucket}/adapters/nli"
    files = _download(stage, "adapters/nli/", folder)
    manifest = verify_digests(files, status.adapter.manifest_digest)
    assert manifest["job"]["uid"] == stage.get()["metadata"]["uid"]
    assert status.adapter.size_bytes == sum(entry["sizeBytes"] for entry in manifest["files"])
    assert (status.adapter.rank, manifest["rank"]) == (4, 4)
    _load_with_peft(stage, folder)


def _download(stage: Stage, prefix: str, folder: Path) -> dict[str, bytes]:
    """Everything below `prefix`, by path, also written to `folder`."""
    files = {key.removeprefix(prefix): content for key, content in stage.s3.objects(stage.bucket, prefix).items()}
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return files


def _load_with_peft(stage: Stage, folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = folder.parent / "base"
    base.mkdir()
    for key, content in stage.s3.objects(stage.bucket, "model/").items():
        (base / key.removeprefix("model/")).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokens = tokenizer("[INST] Premise: anna has tea", return_tensors="pt")
    with torch.no_grad():
        plain = model(**tokens).logits
        tuned = PeftModel.from_pretrained(model, folder)(**tokens).logits
    assert not torch.allclose(plain, tuned)
    assert torch.isfinite(tuned).all()


def _check_events(stage: Stage) -> None:
    events = stage.kube.list("Event", fieldSelector=f"involvedObject.kind={constants.KIND},involvedObject.name=nli")
    assert any("Succeeded" in event["reason"] for event in events), [event["reason"] for event in events]


def test_an_operator_that_is_killed_mid_run_loses_nothing(stage: Stage):
    stage.secret()
    manifest = stage.manifest(training={"maxSteps": 40})
    with stage.operator("first") as operator:
        stage.kube.apply(manifest)
        stage.wait_for("Training", "True")
        [pod] = stage.pods()
        operator.process.kill()
    with stage.operator("second"):
        stage.wait_for("Succeeded", "True")
    status = stage.get()["status"]
    assert [attempt["reason"] for attempt in status["attempts"]] == ["Succeeded"]
    assert [job["metadata"]["name"] for job in stage.kube.list("Job")] == ["nli-1"]
    assert [found["metadata"]["uid"] for found in stage.pods()] == [pod["metadata"]["uid"]]
    assert status["progress"]["step"] == 40


def test_a_job_that_ended_while_the_operator_was_down_is_still_reported(stage: Stage):
    stage.secret()
    with stage.operator("first") as operator:
        stage.kube.apply(stage.manifest())
        wait_until(stage.pods, "the pod is made", 60)
        operator.process.kill()

    def over() -> bool:
        conditions = stage.kube.get("Job", "nli-1").get("status", {}).get("conditions", [])
        return any(condition["type"] == "Complete" for condition in conditions)

    wait_until(over, "the Job is complete", 240)
    with stage.operator("second"):
        stage.wait_for("Succeeded", "True", seconds=60)
    status = stage.get()["status"]
    assert status["adapter"]["uri"] == f"s3://{stage.bucket}/adapters/nli"
    assert "evalLoss" in status["metrics"]


def test_deletion_with_the_operator_down_stops_the_trainer_and_removes_every_child(stage: Stage):
    stage.secret()
    with stage.operator() as operator:
        stage.kube.apply(stage.manifest(training={"maxSteps": 5000}))
        stage.wait_for("Training", "True")
        # Before its first step there is nothing to save, and it leaves at once.
        wait_until(lambda: stage.get()["status"].get("progress", {}).get("step"), "it has made a step", 240)
        [pid] = stage.node.pids()
        operator.process.kill()
    assert not stage.get()["metadata"].get("finalizers")
    assert stage.children()
    stage.kube.delete(constants.KIND, "nli")
    wait_until(lambda: not stage.kube.find(constants.KIND, "nli"), "the job is gone")
    wait_until(lambda: not stage.children(), "every child is gone", 60)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    checkpoints = stage.s3.objects(stage.bucket, "adapters/nli/checkpoints/")
    assert any(key.endswith(constants.MANIFEST_FILE) for key in checkpoints), "it saved a checkpoint on its way out"


def _fails(stage: Stage, reason: str, **sections: object) -> Object:
    """Run a job that has to fail for `reason`; its Succeeded condition. Nothing may have been published or told."""
    with stage.operator(log_level="debug") as operator:
        stage.kube.apply(stage.manifest(**sections))
        found = stage.wait_for("Succeeded", "False")
        metrics = operator.get("/metrics").text
    check_that_no_secret_shows(stage, metrics)
    assert found["reason"] == reason, found
    status = stage.get()["status"]
    assert status["phase"] == "Failed"
    assert "adapter" not in status
    assert status["attempts"][-1]["reason"] == reason
    published = stage.s3.objects(stage.bucket, "adapters/nli/")
    assert f"adapters/nli/{constants.MANIFEST_FILE}" not in published
    assert f"adapters/nli/{constants.ADAPTER_WEIGHTS_FILE}" not in published
    return found


def test_a_broken_row_names_field_file_and_line(stage: Stage):
    stage.secret(**CANARIES)
    lines = stage.s3.objects(stage.bucket, "train.jsonl")["train.jsonl"].splitlines(keepends=True)
    lines[6] = b'{"text": "no end\n'
    stage.s3.client().put_object(Bucket=stage.bucket, Key="broken/rows.jsonl", Body=b"".join(lines))
    found = _fails(stage, "DatasetInvalid", dataset={"train": f"s3://{stage.bucket}/broken/rows.jsonl"})
    assert "spec.dataset.train: rows.jsonl:7: is not JSON" in found["message"]
    assert "Traceback" not in found["message"]
    assert len(stage.get()["status"]["attempts"]) == 1


def test_wrong_keys_are_access_denied(stage: Stage):
    stage.secret(AWS_SECRET_ACCESS_KEY="wrong/CANARY+key", **CANARIES)
    found = _fails(stage, "AccessDenied")
    assert f"s3://{stage.bucket}" in found["message"]
    assert "secretRef" in found["message"]
    assert len(stage.get()["status"]["attempts"]) == 1


def test_keys_that_may_only_read_the_output_are_refused_before_training(stage: Stage):
    stage.secret()
    allow = {"Effect": "Allow", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": "*"}
    keys = stage.s3.add_user(allow)
    stage.secret("read-only", **keys.env)
    found = _fails(stage, "AccessDenied", output={"secretRef": {"name": "read-only"}})
    assert "adapters/nli" in found["message"]
    assert stage.get()["status"].get("progress", {}).get("step", 0) == 0


def test_a_missing_bucket_is_named(stage: Stage):
    stage.secret()
    found = _fails(stage, "ConfigInvalid", output={"uri": "s3://no-such-bucket-here/adapters/nli"})
    assert "output.uri: bucket no-such-bucket-here does not exist" in found["message"]


def test_a_store_out_of_reach_is_retried_then_given_up(stage: Stage, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(stage.node.env, constants.ENV_STORE_PATIENCE, "2")
    place = f"127.0.0.1:{free_port()}"
    stage.secret(AWS_ENDPOINT_URL=f"http://user:CANARY-password@{place}", **CANARIES)
    found = _fails(stage, "Unavailable")
    attempts = stage.get()["status"]["attempts"]
    assert [attempt["reason"] for attempt in attempts] == ["Unavailable", "Unavailable"]
    assert [attempt["exitCode"] for attempt in attempts] == [69, 69]
    assert f"at http://{place}: cannot connect" in found["message"]


def test_a_key_under_the_wrong_name_is_not_told(stage: Stage):
    stage.secret(AWS_ENDPOINT_URL="CANARY/K7MDENG/bPxRfiCYEXAMPLEKEY")
    found = _fails(stage, "ConfigInvalid")
    assert "AWS_ENDPOINT_URL must be http://host:port or https://host" in found["message"]
    assert "CANARY" not in str([stage.kube.list(kind) for kind in (constants.KIND, "Pod", "Event")])
    printed = stage.node.all_logs()
    assert "AWS_ENDPOINT_URL must be" in printed
    assert "CANARY" not in printed


def test_a_missing_secret_shows_in_status_and_mends_itself(stage: Stage):
    with stage.operator():
        stage.kube.apply(stage.manifest())

        def told() -> Object | None:
            found = stage.condition("Scheduled")
            return found if SECRET in found.get("message", "") else None

        found = wait_until(told, "the status names the Secret", 60)
        assert found["status"] == "False"
        assert f'secret "{SECRET}" not found' in found["message"]
        assert stage.get()["status"]["phase"] == "Pending"
        stage.secret()
        stage.wait_for("Succeeded", "True")


def test_an_adapter_that_is_there_already_is_not_overwritten(stage: Stage):
    stage.secret()
    key = f"adapters/nli/{constants.MANIFEST_FILE}"
    weights = b'{"path":"adapter_model.safetensors","sizeBytes":1,"sha256":"' + b"0" * 64 + b'"}'
    body = (
        b'{"schemaVersion":1,"kind":"Adapter","job":{"namespace":"n","name":"other","uid":"u"},'
        b'"createdAt":"2026-01-02T03:04:05Z","files":[' + weights + b"]}"
    )
    stage.s3.client().put_object(Bucket=stage.bucket, Key=key, Body=body)
    with stage.operator():
        stage.kube.apply(stage.manifest())
        found = stage.wait_for("Succeeded", "False")
    assert found["reason"] == "ConfigInvalid"
    assert "already holds an adapter (of n/other, 2026-01-02)" in found["message"]
    assert "output.overwrite" in found["message"]
    assert stage.s3.objects(stage.bucket, key)[key] == body


def test_the_quickstarts_manifest_runs_on_a_cluster_too(stage: Stage, tmp_path: Path):
    """The file that runs on a laptop, with its output in S3 and, to save minutes, a model that knows nothing."""
    stage.secret()
    root, keys = f"s3://{stage.bucket}", {"secretRef": {"name": SECRET}}
    manifest = yaml.safe_load(QUICKSTART.read_text())
    manifest["metadata"]["namespace"] = stage.kube.namespace
    changes = {
        "model": {"source": f"{root}/model", **keys},
        "dataset": {"train": f"{root}/train.jsonl", "eval": f"{root}/eval.jsonl", **keys},
        "output": {"uri": f"{root}/adapters/quickstart", **keys},
        "training": {"maxSteps": 4},
    }
    for section, change in changes.items():
        manifest["spec"][section] |= change
    name = manifest["metadata"]["name"]
    with stage.operator():
        stage.kube.apply(manifest)
        stage.wait_for("Succeeded", "True", name)
    status = stage.get(name)["status"]
    assert status["progress"]["step"] == 4
    folder = tmp_path / "adapter"
    verify_digests(_download(stage, "adapters/quickstart/", folder), status["adapter"]["manifestDigest"])
    _load_with_peft(stage, folder)
