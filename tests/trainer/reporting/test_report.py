"""What the trainer says of itself parses again, whatever the numbers, and fits its place."""

from contextlib import suppress

import pytest

from finetune_api.status import Adapter, TrainerReport
from finetune_trainer.reporting.report import Reporter, termination_message

NO_NUMBERS = {"nan": float("nan"), "infinite": float("inf"), "negative": float("-inf")}


def test_numbers_that_json_does_not_have_are_left_out_of_the_report() -> None:
    reporter = Reporter()
    reporter.metrics({"evalLoss": 0.5} | NO_NUMBERS)
    reporter.progress(step=1, total_steps=2, loss=float("nan"), learning_rate=0.1)
    again = TrainerReport.model_validate_json(reporter.report.model_dump_json(by_alias=True))
    assert again.metrics == {"evalLoss": 0.5}
    assert (again.progress.loss, again.progress.learning_rate) == (None, 0.1)


def test_a_stage_stands_until_the_next_begins_and_never_goes_back() -> None:
    reporter, seen = Reporter(), list[tuple[str, str]]()
    reporter.listen(lambda report: seen.append((report.stage, report.message)))
    with reporter.stage("CheckingData", "looking"):
        pass
    with reporter.stage("Publishing", "sending"):
        with reporter.stage("Verifying", "loading"):
            pass
        reporter.succeeded(
            Adapter(uri="s3://a/b", manifest_digest=f"sha256:{0:064}", size_bytes=1, base_model="b", rank=1), "done"
        )
    assert seen == [
        ("CheckingData", "looking"),
        ("Publishing", "sending"),
        ("Verifying", "loading"),
        ("Succeeded", "done"),
    ]


def test_a_stage_that_fails_is_not_left_for_another() -> None:
    reporter = Reporter()
    with suppress(ValueError), reporter.stage("Publishing", "sending"), reporter.stage("Verifying", "loading"):
        raise ValueError
    assert (reporter.report.stage, reporter.report.message) == ("Verifying", "loading")


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
