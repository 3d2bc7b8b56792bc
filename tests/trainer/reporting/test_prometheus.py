"""The run's Prometheus metrics, as a scrape reads them."""

from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from finetune_api.status import ExecutionPlan, Progress, TrainerReport
from finetune_trainer.reporting.prometheus import Telemetry


def scrape(telemetry: Telemetry) -> dict[str, float]:
    """Sample name (with its labels' values) -> value."""
    return {
        " ".join([sample.name, *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(telemetry.text().decode())
        for sample in family.samples
    }


def report(**fields: Any) -> TrainerReport:
    return TrainerReport(**fields)


def test_a_gauge_appears_once_its_value_is_known() -> None:
    telemetry = Telemetry()
    telemetry.update(report(stage="LoadingModel"))
    assert "finetune_trainer_loss" not in scrape(telemetry)
    telemetry.update(report(stage="Training", progress=Progress(step=3, total_steps=9, loss=1.5)))
    found = scrape(telemetry)
    assert (found["finetune_trainer_loss"], found["finetune_trainer_step"], found["finetune_trainer_steps"]) == (
        1.5,
        3,
        9,
    )
    assert "finetune_trainer_eval_loss" not in found


def test_the_plan_shows_what_memory_it_expects() -> None:
    telemetry = Telemetry()
    telemetry.update(report(execution_plan=ExecutionPlan(micro_batch_size=8, predicted_peak_memory_bytes=10**10)))
    found = scrape(telemetry)
    assert found["finetune_trainer_micro_batch_size"] == 8
    assert found["finetune_trainer_gpu_memory_predicted_peak_bytes"] == 10**10


def test_each_stage_gets_the_time_it_took_and_the_present_one_runs_on() -> None:
    telemetry = Telemetry()
    for stage in ("CheckingData", "Training", "Training", "Evaluating", "Training"):
        telemetry.update(report(stage=stage))
    name = "finetune_trainer_stage_duration_seconds"
    before, after = scrape(telemetry), scrape(telemetry)
    assert {key.split()[1] for key in before if key.startswith(name)} == {
        "Starting", "CheckingData", "Training", "Evaluating"}  # fmt: skip
    assert after[f"{name} Training"] > before[f"{name} Training"]
    assert after[f"{name} Evaluating"] == before[f"{name} Evaluating"]


def test_training_lines_and_evaluations_are_told_apart() -> None:
    telemetry = Telemetry()
    telemetry.track(10, {"loss": 1.0, "gradNorm": 0.7, "tokens": 4000, "secondsPerStep": 0.25})
    telemetry.track(20, {"loss": 0.9, "gradNorm": 0.6, "tokens": 4100, "secondsPerStep": None})
    telemetry.track(20, {"evalLoss": 1.1})
    found = scrape(telemetry)
    assert found["finetune_trainer_gradient_norm"] == 0.6
    assert found["finetune_trainer_step_duration_seconds"] == 0.25
    assert found["finetune_trainer_tokens_total"] == 8100
    assert found["finetune_trainer_evaluations_total"] == 1


def test_checkpoints_are_counted_with_the_time_they_took() -> None:
    telemetry = Telemetry()
    telemetry.checkpoint_saved(1.5)
    telemetry.checkpoint_saved(2.5)
    found = scrape(telemetry)
    assert found["finetune_trainer_checkpoints_total"] == 2
    assert found["finetune_trainer_checkpoint_duration_seconds_sum"] == 4.0


def test_the_process_itself_is_measured() -> None:
    assert scrape(Telemetry())["process_resident_memory_bytes"] > 10**6
