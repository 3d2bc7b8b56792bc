"""The best evaluation so far, and early stopping."""

import math
from collections.abc import Mapping

from finetune_api.spec_evaluation import Evaluation
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.methods.base import Method


def judge(
    state: TrainingState, metrics: Mapping[str, float], *, step: int, evaluation: Evaluation, method: Method
) -> tuple[bool, bool]:
    """Enter an evaluation into `state`.

    Args:
        state: Its best values and its count of evaluations without a gain are updated.
        metrics: The evaluation at `step`.
        step: Optimizer steps done.
        evaluation: Says which metric decides, and how patient early stopping is.
        method: Says which metrics should fall.

    Returns:
        Whether this is the best evaluation so far, and whether training should stop early.
    """
    stopping = evaluation.early_stopping
    metric = stopping.metric if stopping else "evalLoss"
    value = metrics[metric]
    is_best = better(value, state.best.get(metric), metric, method)
    if is_best:
        state.best, state.best_step = dict(state.metrics), step
    if stopping is None:
        return is_best, False
    if better(value, state.value_to_beat, metric, method, stopping.min_delta):
        state.value_to_beat, state.evaluations_without_gain = value, 0
        return is_best, False
    state.evaluations_without_gain += 1
    return is_best, state.evaluations_without_gain >= stopping.patience


def better(value: float, best: float | None, metric: str, method: Method, min_delta: float = 0.0) -> bool:
    """Return whether `value` improves on `best` by more than `min_delta`, in the direction that `metric` should go."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value < best - min_delta if metric in method.minimized else value > best + min_delta
