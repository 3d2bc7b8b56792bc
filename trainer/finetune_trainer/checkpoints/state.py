"""What a run must remember beyond weights and optimizer to go on as if it had never stopped; part of a checkpoint."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from finetune_api.spec_evaluation import Evaluation
from finetune_trainer.stores.json_numbers import drop_non_finite

STATE_FILE = "finetune_state.json"


@dataclass
class TrainingState:
    """Progress of one run. `metrics` are those of the latest evaluation, `best` and `before` those of two others.

    `finished`: no step is left to train; an evaluation may still be due.
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
    tokens: int = 0
    train_seconds: float = 0.0
    loss_since_log: float = 0.0
    last_logged_step: int = 0

    def needs_baseline(self, evaluation: Evaluation) -> bool:
        """Return whether the base model is still to be measured."""
        return evaluation.on_start and not self.before and not self.step

    def metrics_before(self) -> dict[str, float]:
        """The metrics ahead of training as `<name>Before`; the confusion matrix is left out."""
        return {f"{key}Before": value for key, value in self.before.items() if "." not in key}

    def final_metrics(self, keep_best: bool) -> dict[str, float]:
        """The metrics of the adapter to publish, with those before training as `<name>Before`, and the speed."""
        chosen = self.best if keep_best and self.best else self.metrics
        metrics = chosen | self.metrics_before() | {"trainSeconds": round(self.train_seconds, 3)}
        if self.train_seconds:
            metrics["tokensPerSecond"] = round(self.tokens / self.train_seconds, 1)
        return drop_non_finite(metrics)

    def save(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "TrainingState":
        """What `save` wrote to `folder`, perhaps by another version: what this one does not know is left out."""
        known = {field.name for field in fields(cls)}
        found = json.loads((folder / STATE_FILE).read_text())
        return cls(**{key: value for key, value in found.items() if key in known})
