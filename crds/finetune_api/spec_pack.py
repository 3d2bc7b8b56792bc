"""What a FineTuneJob of several trials holds: which train in its process, and how they are compared.

A FineTuneSweep makes such jobs (sweep_packs.py). The values of trials are JSON text, for what a job holds has bounds.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from pydantic_core import from_json

from finetune_api.base import ApiModel, Rule
from finetune_api.fields import PositiveInt, each_once, refusal, text_type
from finetune_api.patterns import TextRule

#: A trial's FineTuneJob is named <sweep>-<trial>, within what any job's name may have.
MAX_SWEEP_NAME = 40
SWEEP_NAME = TextRule(
    rf"^[a-z]([a-z0-9-]{{0,{MAX_SWEEP_NAME - 2}}}[a-z0-9])?$",
    f"must be at most {MAX_SWEEP_NAME} lowercase letters, digits and dashes, a letter first and no dash last,"
    " for its trials are named after it",
)
_TRIAL_NAME = TextRule(
    r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$",
    "must be lowercase letters, digits and dashes, a letter or digit first and last, for it names a job and a folder",
)
_JSON = TextRule(r"^[ -~]*$", "must be JSON in ASCII")
SweepName = text_type(SWEEP_NAME, max_length=253)
TrialName = text_type(_TRIAL_NAME, max_length=MAX_SWEEP_NAME)
#: Trials of one pack: what it says of each of them at its end fits into a termination message.
MAX_PACK = 24
#: Of one trial's values: all of them, and a job of the largest size, fit into the annotation of a pod.
MAX_PACKED_VALUES = 1024


def _json_object(text: str) -> str:
    try:
        found = from_json(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise refusal("must be a JSON object")
    return text


class Objective(ApiModel):
    """What makes one trial better than another."""

    metric: Literal["evalLoss", "trainLoss", "accuracy", "f1"] = "evalLoss"
    """Final metric to compare."""
    direction: Literal["minimize", "maximize"] | None = None
    """Default: minimize a loss, maximize the others."""

    @property
    def minimizes(self) -> bool:
        """Whether less is better."""
        return (self.direction or ("minimize" if self.metric.endswith("Loss") else "maximize")) == "minimize"


class Halving(ApiModel):
    """Asynchronous successive halving: at each rung, only the best part of the trials that reached it goes on."""

    RULES: ClassVar = (
        Rule(
            "self.rungs.isSorted()",
            lambda h: h.rungs == sorted(set(h.rungs)),
            "must be different steps in ascending order",
            "rungs",
        ),
    )

    rungs: Annotated[
        list[PositiveInt],
        Field(min_length=1, max_length=16, json_schema_extra={"x-kubernetes-list-type": "set"}),
    ]
    """Optimizer steps at which trials are compared; multiples of template.evaluation.everySteps."""
    reduction_factor: Annotated[int, Field(ge=2, le=16)] = 4
    """One in so many goes on."""

    def is_behind(self, value: float, passed: Sequence[float]) -> bool:
        """Return whether a trial with `value` at a rung falls behind: whether it is not among the best that passed it.

        `passed` holds the values there of all trials so far, its own too. One that equals the last of the best goes on.
        """
        going_on = max(1, len(passed) // self.reduction_factor)
        return value > sorted(passed)[going_on - 1]


class PackedTrial(ApiModel):
    """One trial of a pack."""

    name: TrialName  # type: ignore[valid-type]
    """Its name: its adapter goes to output.uri/<name>/."""
    values: Annotated[text_type(_JSON, max_length=MAX_PACKED_VALUES), AfterValidator(_json_object)] = "{}"  # type: ignore[valid-type]
    """What differs from the job's spec, as JSON: the value at each path."""


class Pack(ApiModel):
    """Trials of a FineTuneSweep that train in one process. Set by the sweep: write a FineTuneSweep."""

    sweep: SweepName  # type: ignore[valid-type]
    """Name of the sweep."""
    trials: Annotated[
        list[PackedTrial],
        Field(
            min_length=1,
            max_length=MAX_PACK,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
        each_once("name"),
    ]
    """The trials, in the order of their start."""
    at_once: Annotated[int, Field(ge=1, le=MAX_PACK)] = 1
    """How many train at the same time."""
    objective: Objective = Field(default_factory=Objective)
    """What makes one trial better than another."""
    early_stopping: Halving | None = None
    """Stop trials that fall behind the others of the pack."""
