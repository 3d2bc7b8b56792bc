"""A sweep whose trials share one pod: every part is the real one, as in test_end_to_end.py."""

import json
from typing import Any

import pytest

from finetune_api import constants
from support.installation.installation import PATIENCE, Stage
from support.server.client import Object, wait_until

pytestmark = pytest.mark.nightly
TRIALS: dict[str, dict[str, Any]] = {
    "low": {"training.learningRate": 0.001},
    "high": {"training.learningRate": 0.01, "lora.rank": 8},
    "wrong": {"lora.targetModules": ["no_such_layer"]},
    "late": {"training.seed": 7},
}


def test_each_trial_ends_as_its_own_verified_adapter_though_their_pod_is_deleted_meanwhile(stage: Stage) -> None:
    stage.secret()
    template = stage.manifest(training={"maxSteps": 40}, checkpoint={"everySteps": 5})["spec"]
    template["output"] = template["output"] | {"uri": f"s3://{stage.bucket}/adapters/{{name}}"}
    trials = [{"name": name, "values": values} for name, values in TRIALS.items()]
    spec = {"template": template, "trials": trials, "packing": "enabled", "parallelism": 2}
    kind = {"apiVersion": constants.API_VERSION, "kind": constants.SWEEP_KIND}
    stage.kube.create(kind | {"metadata": {"name": "rates"}, "spec": spec})

    def rows() -> dict[str, Object]:
        status = stage.kube.get(constants.SWEEP_KIND, "rates").get("status") or {}
        return {row["name"]: row for row in status.get("trials", [])}

    def is_over() -> Object | None:
        status = stage.kube.get(constants.SWEEP_KIND, "rates")["status"]
        return status if status.get("completionTime") else None

    with stage.operator():
        wait_until(lambda: rows().get("low", {}).get("phase") == "Running", "it runs", PATIENCE)
        stage.wait_for("Training", "True", "rates-pack-0")
        wait_until(
            lambda: stage.get("rates-pack-0")["status"].get("progress", {}).get("step", 0) > 10, "steps", PATIENCE
        )
        stage.kube.delete("Pod", stage.pods("rates-pack-0")[0]["metadata"]["name"])
        status = wait_until(is_over, "the sweep is over", 2 * PATIENCE)
    assert {name: row["phase"] for name, row in rows().items()} == {
        "low": "Succeeded",
        "high": "Succeeded",
        "wrong": "Failed",
        "late": "Succeeded",
    }
    assert rows()["wrong"]["reason"] == "ConfigInvalid"
    [job] = stage.kube.list(constants.KIND)
    assert [row["phase"] for row in job["status"]["trials"]] == ["Succeeded", "Succeeded", "Failed", "Succeeded"]
    values = {name: row["value"] for name, row in rows().items() if "value" in row}
    best = min(values, key=lambda name: values[name])
    assert status["best"]["trial"] == best and len(values) == 3
    assert status["best"]["uri"] == f"s3://{stage.bucket}/adapters/rates/{best}/"
    for name in values:
        files = stage.s3.objects(stage.bucket, f"adapters/rates/{name}/")
        manifest = json.loads(files[f"adapters/rates/{name}/manifest.json"])
        assert manifest["job"]["name"] == f"rates-{name}" and manifest["step"] == 40
        losses = [json.loads(line) for line in files[f"adapters/rates/{name}/training/metrics.jsonl"].splitlines()]
        steps = [line["step"] for line in losses if "loss" in line]
        assert steps == sorted(set(steps)), "no step is told twice"
