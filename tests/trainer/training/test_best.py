"""Which evaluation is the best, and when to stop early."""

import pytest

from finetune_api.spec_evaluation import Evaluation
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.methods import METHODS
from finetune_trainer.training.best import better, judge

SFT = METHODS["sft"]


@pytest.mark.parametrize(
    ("metric", "value", "best", "min_delta", "expected"),
    [
        ("evalLoss", 1.0, None, 0.0, True),
        ("evalLoss", 0.9, 1.0, 0.0, True),
        ("evalLoss", 1.0, 1.0, 0.0, False),
        ("evalLoss", 0.95, 1.0, 0.1, False),
        ("evalLoss", float("nan"), None, 0.0, False),
        ("accuracy", 0.9, 0.8, 0.0, True),
        ("accuracy", 0.7, 0.8, 0.0, False),
        ("f1", 0.85, 0.8, 0.1, False),
    ],
)
def test_losses_should_fall_and_all_else_rise(
    metric: str, value: float, best: float | None, min_delta: float, expected: bool
) -> None:
    assert better(value, best, metric, SFT, min_delta) is expected


def test_patience_counts_evaluations_without_enough_gain_and_a_gain_resets_it() -> None:
    evaluation = Evaluation.model_validate({"earlyStopping": {"patience": 2, "minDelta": 0.1}})
    state, verdicts = TrainingState(), []
    for step, loss in enumerate((1.0, 0.95, 0.8, 0.79, 0.78), 1):
        state.metrics = {"evalLoss": loss}
        verdicts.append(judge(state, state.metrics, step=step, evaluation=evaluation, method=SFT))
    assert verdicts == [(True, False), (True, False), (True, False), (True, False), (True, True)]
    assert (state.best, state.best_step, state.value_to_beat) == ({"evalLoss": 0.78}, 5, 0.8)


def test_without_early_stopping_only_the_best_is_kept() -> None:
    state = TrainingState()
    for step, loss in enumerate((1.0, 0.5, 0.7), 1):
        state.metrics = {"evalLoss": loss}
        assert not judge(state, state.metrics, step=step, evaluation=Evaluation(), method=SFT)[1]
    assert (state.best_step, state.evaluations_without_gain) == (2, 0)
