"""The status model reads what a trainer or an older version wrote, and never what JSON cannot carry."""

import json

import pytest

from finetune_api.status import FineTuneJobStatus, Progress, TrainerReport

NO_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", '"NaN"', "null")


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_number_that_json_does_not_have_is_dropped_and_the_rest_of_the_report_kept(value: str):
    progress = f'{{"step": 7, "percent": {value}, "loss": {value}, "epoch": {value}, "evalLoss": 0.5}}'
    body = f'{{"stage": "Training", "progress": {progress}, "metrics": {{"evalLoss": {value}, "trainLoss": 0.4}}}}'
    report = TrainerReport.model_validate_json(body)
    assert report.progress == Progress(step=7, eval_loss=0.5)
    assert report.metrics == {"trainLoss": 0.4}
    assert TrainerReport.model_validate_json(report.model_dump_json(by_alias=True)) == report
    json.dumps(report.manifest(), allow_nan=False)


def test_the_trainers_own_models_drop_it_as_well():
    assert Progress.model_validate({"step": 1, "loss": float("nan")}).loss is None
    assert FineTuneJobStatus(metrics={"loss": float("inf"), "other": 1.0}).metrics == {"other": 1.0}


@pytest.mark.parametrize(
    "body", ['{"progress": {"step": 1e30}}', '{"progress": {"step": -1}}', '{"metrics": {"a": "b"}}']
)
def test_nonsense_is_still_refused(body: str):
    with pytest.raises(ValueError):
        TrainerReport.model_validate_json(body)
