"""A run that does not pass its gate keeps its adapter aside, whole, and ends well, wherever it was killed."""

import json
from pathlib import Path

from finetune_api import constants
from support.trainer.process import job, train

UID = "0f3c9a77-1111"


def test_a_run_killed_after_its_gate_was_not_passed_keeps_the_same_candidate(tiny_model: Path, tmp_path: Path) -> None:
    asked = [{"metric": "evalLoss", "atMost": 0.001}]
    changes = {"training.maxSteps": 2, "publish.onlyIf": asked, "output.keepCheckpoints": True}
    config, out = job(tmp_path, tiny_model, changes, uid=UID), tmp_path / "out"
    first = train(config, tmp_path / "first")
    kept = out / "candidates/tiny-0f3c9a77"
    manifest = json.loads((kept / constants.MANIFEST_FILE).read_text())
    loss = first.report["metrics"]["evalLoss"]
    assert (first.exit_code, first.report["stage"], first.report["reason"]) == (0, "Succeeded", "GateNotPassed")
    assert "adapter" not in first.report
    assert first.report["candidate"]["uri"] == f"file://{kept}"
    assert first.report["gate"] == manifest["gate"]
    assert (manifest["gate"][0]["value"], manifest["gate"][0]["bar"], manifest["gate"][0]["passed"]) == (
        loss,
        0.001,
        False,
    )
    assert f"Not published: evalLoss {loss:.5g}, at most 0.001 is asked" in first.message
    assert not (out / constants.MANIFEST_FILE).exists()
    weights = (kept / constants.ADAPTER_WEIGHTS_FILE).read_bytes()

    # Killed before the candidate's manifest was written: only the rest is done again.
    (kept / constants.MANIFEST_FILE).unlink()
    second = train(config, tmp_path / "second")
    assert (second.exit_code, second.report["reason"]) == (0, "GateNotPassed"), second.log
    assert "Training is complete (step 2); only publishing remains" in second.log
    assert (kept / constants.ADAPTER_WEIGHTS_FILE).read_bytes() == weights

    # Killed after it: the candidate is found, loaded back and reported again, with both numbers.
    third = train(config, tmp_path / "third")
    assert (third.exit_code, third.report["reason"]) == (0, "GateNotPassed"), third.log
    assert third.report["candidate"] == second.report["candidate"]
    assert (third.report["gate"], third.message) == (second.report["gate"], second.message)
    assert '"stage": "LoadingModel"' not in third.log
    assert not (out / constants.MANIFEST_FILE).exists()
