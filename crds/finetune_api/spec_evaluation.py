"""Section of the spec: what is measured on held-out rows, and what follows from it."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.fields import PositiveInt, Text


class EarlyStopping(ApiModel):
    """Stop when the metric no longer improves."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without improvement before stopping."""
    metric: Literal["evalLoss", "accuracy", "f1"] = "evalLoss"
    """Metric to watch. evalLoss should fall, the others should rise."""
    min_delta: Annotated[float, Field(ge=0)] = 0
    """A smaller change does not count as an improvement."""


class Generation(ApiModel):
    """How answers are generated and read for the nli metrics."""

    answer_marker: Text = "[/INST]"
    """In text rows, the answer follows the last such marker. Other formats know their answer."""
    label_key: Text = "predicted_label"
    """Key of the answer's JSON object that holds the label."""
    max_new_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    """Tokens to generate at most for one answer."""
    max_rows: PositiveInt = 200
    """Held-out rows to generate answers for, from the first."""
    publish_answers: bool = True
    """Publish training/answers.jsonl: prompt, right answer and answer of up to 200 of these rows."""


class Evaluation(ApiModel):
    """What is measured on dataset.eval, and what follows from it."""

    every_steps: PositiveInt = 250
    """Optimizer steps between evaluations. There is always one at the end."""
    metrics: Annotated[list[Literal["loss", "nli"]], Field(min_length=1, max_length=2)] = ["loss"]
    """loss; nli generates answers and reports accuracy, precision, recall, F1 and the share of valid JSON."""
    on_start: bool = True
    """Evaluate once before the first step, so that the gain is known."""
    early_stopping: EarlyStopping | None = None
    """Off unless given. Needs dataset.eval."""
    keep_best: bool = True
    """Publish the adapter of the best evaluation instead of the last. Without dataset.eval there is only the last."""
    generation: Generation = Field(default_factory=Generation)
    """Settings of the nli metrics."""
