"""Training state beyond weights and optimizer that an exact resume needs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from finetune_api.spec_evaluation import Evaluation
from finetune_trainer.stores.json_numbers import drop_non_finite

STATE_FILE = "finetune_state.json"


@dataclass
class TrainingState:
    """The only state that training changes; all of it is in every checkpoint.

    Attributes:
        fingerprint: What decides the run's result.
        step: Optimizer steps done at the last checkpoint.
        finished: No step is left to train; an evaluation may still be due.
        before: Metrics of the base model.
        metrics: Metrics of the latest evaluation, and the latest training loss.
        best: Metrics of the best evaluation, at `best_step`.
        value_to_beat: What early stopping compares with.
        evaluations_without_gain: How often in a row it was not beaten.
        evaluation_due: The evaluation at `step` is still to be done.
        outperformed: Why the run ended at `step`, where it fell behind the other trials of its process.
        tokens: Real tokens trained on, over all ranks; `train_seconds` the time that took.
        loss_since_log: Loss summed over the steps since `last_logged_step`.
    """

    fingerprint: str = ""
    step: int = 0
    finished: bool = False
    before: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    value_to_beat: float | None = None
    evaluations_without_gain: int = 0
    evaluation_due: bool = False
    outperformed: str = ""
    tokens: int = 0
    train_seconds: float = 0.0
    loss_since_log: float = 0.0
    last_logged_step: int = 0

    def needs_baseline(self, evaluation: Evaluation) -> bool:
        """Return whether the base model is still to be measured."""
        return evaluation.on_start and not self.before and not self.step

    def metrics_before(self) -> dict[str, float]:
        """Return the base model's metrics as `<name>Before`, without the confusion matrix."""
        return {f"{key}Before": value for key, value in self.before.items() if "." not in key}

    def final_metrics(self, keep_best: bool) -> dict[str, float]:
        """Return the metrics of the adapter to publish, the base model's as `<name>Before`, and the speed."""
        chosen = self.best if keep_best and self.best else self.metrics
        metrics = chosen | self.metrics_before() | {"trainSeconds": round(self.train_seconds, 3)}
        if self.train_seconds:
            metrics["tokensPerSecond"] = round(self.tokens / self.train_seconds, 1)
        return drop_non_finite(metrics)

    def save(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "TrainingState":
        """Read what `save` wrote to `folder`; fields of another version that this one does not know are dropped.

        Raises ValueError, OSError or RecursionError if that is not there.
        """
        found = json.loads((folder / STATE_FILE).read_bytes())
        try:
            return TypeAdapter(cls).validate_python(found)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
