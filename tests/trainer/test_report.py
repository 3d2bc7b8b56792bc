"""What the trainer says of itself parses again, whatever the numbers, and fits its place."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from finetune_api.artifact_manifest import FileRecord, StoreManifest
from finetune_api.status import TrainerReport
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.reporting.report import Reporter, termination_message

NO_NUMBERS = {"nan": float("nan"), "infinite": float("inf"), "negative": float("-inf")}


def test_numbers_that_json_does_not_have_are_left_out_of_the_report() -> None:
    reporter = Reporter()
    reporter.metrics({"evalLoss": 0.5} | NO_NUMBERS)
    reporter.progress(step=1, total_steps=2, loss=float("nan"), learning_rate=0.1)
    again = TrainerReport.model_validate_json(reporter.report.model_dump_json(by_alias=True))
    assert again.metrics == {"evalLoss": 0.5}
    assert (again.progress.loss, again.progress.learning_rate) == (None, 0.1)


def test_a_manifest_with_such_numbers_is_readable() -> None:
    manifest = StoreManifest(
        kind="Adapter",
        created_at=datetime.now(UTC),
        files=[FileRecord(path="a", size_bytes=1, sha256="0" * 64)],
        metrics={"evalLoss": 0.5} | NO_NUMBERS,
    )
    assert StoreManifest.model_validate_json(manifest.to_bytes()).metrics == {"evalLoss": 0.5}
    written_before = manifest.to_bytes().replace(b"0.5", b"null")
    assert StoreManifest.model_validate_json(written_before).metrics == {}


def test_every_line_of_the_metrics_file_is_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    folder = RunDirectory(tmp_path)
    folder.record(step=1, loss=0.5, gradNorm=float("inf"), **NO_NUMBERS)
    line = json.loads(folder.metrics_file.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": 0.5}


def test_a_state_of_another_version_is_read(tmp_path: Path) -> None:
    TrainingState(step=3, fingerprint="f").save(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"of_a_later_version": 1}))
    assert TrainingState.load(tmp_path) == TrainingState(step=3, fingerprint="f")


@pytest.mark.parametrize("message", ["short", "ü" * 9000, '\n\x01"' * 3000])
def test_the_confusion_matrix_goes_before_the_figures_do(message: str) -> None:
    confusion = {f"confusion.{row}.{column}": 1 / 3 for row in range(12) for column in range(12)}
    figures = {"evalLoss": 0.5, "accuracy": 0.75, "f1": 0.7}
    text = termination_message(TrainerReport(message=message, metrics=figures | confusion))
    kept = TrainerReport.model_validate_json(text)
    assert len(text) <= 4096
    assert kept.metrics == figures
    assert kept.message == message or (kept.message.endswith("…") and len(kept.message.encode()) > 500)


def test_the_whole_room_is_used() -> None:
    for length in range(3900, 4200, 7):
        text = termination_message(TrainerReport(message="\t" * (length // 2), metrics={"evalLoss": 0.5}))
        assert len(text) <= 4096
        kept = TrainerReport.model_validate_json(text)
        assert kept.metrics == {"evalLoss": 0.5}
        assert not kept.message.endswith("…") or len(text) >= 4094
