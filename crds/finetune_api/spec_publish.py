"""Section of the spec: what an adapter must reach on held-out rows to be published."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Rule
from finetune_api.fields import StoreUri
from finetune_api.gate import MAX_CHECKS

#: A metric of this name improves as it falls, all others as they rise.
LOSS = "evalLoss"


class Requirement(ApiModel):
    """One condition on a metric of the adapter to publish."""

    RULES: ClassVar = (
        Rule(
            "[has(self.atLeast), has(self.atMost), has(self.betterThan)].filter(given, given).size() == 1",
            lambda r: [r.at_least, r.at_most, r.better_than].count(None) == 2,
            "needs one of atLeast, atMost and betterThan",
            "metric",
        ),
        Rule(
            "self.metric != 'evalLoss' || !has(self.atLeast)",
            lambda r: r.metric != LOSS or r.at_least is None,
            "is for metrics that should rise: evalLoss takes atMost",
            "atLeast",
        ),
        Rule(
            "self.metric == 'evalLoss' || !has(self.atMost)",
            lambda r: r.metric == LOSS or r.at_most is None,
            "is for evalLoss, which should fall: other metrics take atLeast",
            "atMost",
        ),
    )

    metric: Literal["evalLoss", "accuracy", "precision", "recall", "f1", "validJson"]
    """Measured on the held-out rows. All but evalLoss need nli in evaluation.metrics."""
    at_least: Annotated[float, Field(ge=0, le=1)] | None = None
    """The least value that passes."""
    at_most: Annotated[float, Field(ge=0, le=1000)] | None = None
    """The largest loss that passes."""
    better_than: StoreUri | None = None
    """An adapter that this one must beat on the same held-out rows: its folder, or a prefix with a latest.json."""

    @property
    def told(self) -> str:
        """The condition in words: 'f1 is at least 0.9'."""
        if self.at_least is not None:
            return f"{self.metric} is at least {self.at_least:g}"
        if self.at_most is not None:
            return f"{self.metric} is at most {self.at_most:g}"
        return f"{self.metric} is better than that of {self.better_than}"


class Publish(ApiModel):
    """When an adapter is published. One that does not pass is kept below candidates/ of output.uri."""

    only_if: Annotated[list[Requirement], Field(min_length=1, max_length=MAX_CHECKS)]
    """Conditions that all must be met."""
