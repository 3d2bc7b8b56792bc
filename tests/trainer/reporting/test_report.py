"""What the trainer says of itself parses again, whatever the numbers, and fits its place."""

from contextlib import suppress
from datetime import UTC, datetime

import pytest

from finetune_api.gate import GateCheck
from finetune_api.status import Adapter, ExecutionPlan, Progress, Resumption, TrainerReport
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
    assert len(text) <= 1536
    assert kept.metrics == figures
    assert kept.message == message or (kept.message.endswith("…") and len(kept.message.encode()) > 400)


def test_a_report_that_is_too_long_still_tells_a_candidate_from_a_published_adapter() -> None:
    adapter = Adapter(uri="s3://a/b", manifest_digest=f"sha256:{0:064}", size_bytes=1, base_model="b" * 1000, rank=1)
    other = f"s3://a/{'c' * 900}"
    check = GateCheck(metric="f1", comparison="betterThan", other=other, passed=False, problem="p" * 500)
    for number in (1, 8):
        reporter = Reporter()
        reporter.gate([check] * number)
        reporter.kept_back(adapter, "not published: f1 0.5")
        text = termination_message(reporter.report)
        read = TrainerReport.model_validate_json(text)
        assert len(text) <= 1536
        assert (read.reason, read.adapter) == ("GateNotPassed", None)
        assert read.candidate is not None
        assert read.candidate.uri == "s3://a/b"


def test_the_whole_room_is_used() -> None:
    for length in range(1340, 1640, 7):
        text = termination_message(TrainerReport(message="\t" * (length // 2), metrics={"evalLoss": 0.5}))
        assert len(text) <= 1536
        kept = TrainerReport.model_validate_json(text)
        assert kept.metrics == {"evalLoss": 0.5}
        assert not kept.message.endswith("…") or len(text) >= 1534


def _finished(length: int) -> TrainerReport:
    """The report of a run with all that one can have, and URIs of `length` characters."""
    now = datetime(2026, 11, 28, 12, 0, 0, 123456, tzinfo=UTC)
    names = ("accuracy", "precision", "recall", "f1", "validJson", "evalLoss")
    figures = {f"{name}{when}": 1 / 3 for name in names for when in ("", "Before")}
    pairs = {f"confusion.{right}.{read}": 12345.0 for right in "0123" for read in ("0", "1", "2", "3", "none")}
    return TrainerReport(
        stage="Succeeded",
        reason="Succeeded",
        message="The adapter is published and was loaded back: " + "s3://a/b/" * (length // 9),
        progress=Progress(
            step=12000,
            total_steps=12000,
            summary="12000/12000",
            percent=100,
            epoch=3,
            loss=2 / 3,
            eval_loss=1 / 7,
            learning_rate=1 / 3e9,
            tokens_per_second=1e5 / 3,
            estimated_completion_time=now,
            updated_at=now,
        ),
        execution_plan=ExecutionPlan(
            micro_batch_size=8,
            gradient_accumulation_steps=2,
            world_size=8,
            sharded=False,
            compiled=True,
            fp8=True,
            attention="varlen",
            predicted_peak_memory_bytes=2**36,
            measured_peak_memory_bytes=2**36 + 1,
        ),
        metrics={"trainLoss": 1 / 3, "trainSeconds": 12345.678, "tokensPerSecond": 33333.3} | figures | pairs,
        resumed_from=Resumption(step=6000, job_uid="u" * 36),
        adapter=Adapter(
            uri="s3://" + "a" * (length - 5),
            manifest_digest=f"sha256:{0:064}",
            size_bytes=2**40,
            base_model="s3://" + "m" * (length - 5),
            rank=256,
        ),
    )


@pytest.mark.parametrize("length", [20, 100, 300, 600, 900, 1024])
def test_a_report_of_success_fits_beside_other_containers_with_the_adapter_first(length: int) -> None:
    """Four containers share 12 KiB; a report that is cut still begins with where the adapter is."""
    report = _finished(length)
    text = termination_message(report)
    assert len(text) <= 1536
    kept = TrainerReport.model_validate_json(text)
    assert text.startswith(b'{"adapter":{"uri":"s3://')
    assert report.adapter and kept.adapter
    assert kept.adapter.model_copy(update={"base_model": ""}) == report.adapter.model_copy(update={"base_model": ""})
    assert (kept.stage, kept.reason, kept.resumed_from) == ("Succeeded", "Succeeded", report.resumed_from)
    assert kept.progress.step == 12000
    if length <= 100:
        assert kept.adapter == report.adapter
        assert kept.metrics["evalLoss"] == pytest.approx(1 / 3, rel=1e-5)
        assert kept.execution_plan and kept.execution_plan.micro_batch_size == 8


def test_the_gpu_is_named_as_node_labels_name_it() -> None:
    reporter = Reporter()
    reporter.gpu("NVIDIA H100 80GB HBM3")
    assert reporter.report.gpu == "NVIDIA-H100-80GB-HBM3"
    reporter.gpu("")  # the CPU
    assert reporter.report.gpu is None
