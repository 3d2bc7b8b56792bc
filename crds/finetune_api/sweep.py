"""FineTuneSweep and its spec: one template, many trials. A field's docstring is its description in the CRD."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Rule
from finetune_api.fields import PositiveInt, Seconds, text_type
from finetune_api.patterns import TextRule
from finetune_api.spec import FineTuneJobSpec, Metadata

#: Trials of one sweep: each has a row in its status, which must fit into one object.
MAX_TRIALS = 1000
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
_PATH = TextRule(
    r"^[a-z][A-Za-z0-9]*([.][a-z][A-Za-z0-9]*)*$",
    "must be a path of a FineTuneJob's spec, such as training.learningRate",
)
ParameterPath = text_type(_PATH, max_length=128)
TrialName = text_type(_TRIAL_NAME, max_length=MAX_SWEEP_NAME)
SweepName = text_type(SWEEP_NAME, max_length=253)
#: Whatever the field at the path takes; it is checked as part of each trial's spec.
AnyValue = Annotated[Any, Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
Bound = Annotated[float, Field(ge=-1e12, le=1e12)]
_BY_KEY = "x-kubernetes-list-map-keys"


def _keyed(key: str, most: int) -> Any:
    return Field(min_length=1, max_length=most, json_schema_extra={"x-kubernetes-list-type": "map", _BY_KEY: [key]})


class Parameter(ApiModel):
    """One field of the template, and the values it takes."""

    RULES: ClassVar = (
        Rule(
            "has(self.min) == has(self.max)",
            lambda p: (p.min is None) == (p.max is None),
            "min and max belong together",
            "min",
        ),
        Rule(
            "!has(self.min) || !has(self.max) || self.min < self.max",
            lambda p: p.min is None or p.max is None or p.min < p.max,
            "must be less than max",
            "min",
        ),
        Rule(
            "self.scale != 'log' || (has(self.min) && self.min > 0.0)",
            lambda p: p.scale != "log" or (p.min is not None and p.min > 0),
            "log needs min and max above 0",
            "scale",
        ),
    )

    path: ParameterPath  # type: ignore[valid-type]
    """Field of a FineTuneJob's spec, such as training.learningRate."""
    values: Annotated[list[AnyValue], Field(min_length=1, max_length=MAX_TRIALS)] | None = None
    """The values to try. Either these, or min and max."""
    min: Bound | None = None
    """Least value. Needs strategy random or tpe."""
    max: Bound | None = None
    """Greatest value."""
    scale: Literal["linear", "log"] = "linear"
    """How values between min and max are drawn: log suits learning rates."""


class Trial(ApiModel):
    """One trial by name."""

    name: TrialName  # type: ignore[valid-type]
    """Its name: its FineTuneJob is called after the sweep and it, and its adapter lies in a folder of this name."""
    values: Annotated[dict[str, AnyValue], Field(max_length=32)] = {}
    """What differs from the template: the value at each path of a FineTuneJob's spec."""


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


_EVAL = "has(self.template.dataset.eval) || has(self.template.dataset.evalFraction)"


class FineTuneSweepSpec(ApiModel):
    """One template, and how its trials differ. Give either parameters or trials."""

    RULES: ClassVar = (
        Rule(
            "has(self.parameters) != has(self.trials)",
            lambda s: (s.parameters is None) != (s.trials is None),
            "give either parameters or trials",
            "parameters",
        ),
        Rule(
            "self.strategy != 'grid' || !has(self.parameters) || self.parameters.all(p, !has(p.min))",
            lambda s: s.strategy != "grid" or all(p.min is None for p in s.parameters or ()),
            "grid needs values for every parameter; min and max need random or tpe",
            "strategy",
        ),
        Rule(
            "self.strategy == 'grid' || has(self.parameters)",
            lambda s: s.strategy == "grid" or s.parameters is not None,
            "random and tpe draw from parameters: named trials run as they are",
            "strategy",
        ),
        Rule(
            "(self.strategy != 'grid') == has(self.maxTrials)",
            lambda s: (s.strategy != "grid") == (s.max_trials is not None),
            "is needed by strategy random and by tpe, and by no other",
            "maxTrials",
        ),
        Rule(
            "self.strategy != 'grid' || !has(self.seed)",
            lambda s: s.strategy != "grid" or s.seed is None,
            "needs strategy random or tpe",
            "seed",
        ),
        Rule(
            f"self.objective.metric == 'trainLoss' || {_EVAL}",
            lambda s: s.objective.metric == "trainLoss" or s.template.dataset.holds_out,
            "needs held-out rows: set template.dataset.eval or template.dataset.evalFraction",
            "objective.metric",
        ),
        Rule(
            "!(self.objective.metric in ['accuracy', 'f1']) || 'nli' in self.template.evaluation.metrics",
            lambda s: s.objective.metric not in ("accuracy", "f1") or "nli" in s.template.evaluation.metrics,
            "accuracy and f1 are measured only when template.evaluation.metrics holds nli",
            "objective.metric",
        ),
        Rule(
            "!has(self.earlyStopping) || self.objective.metric == 'evalLoss'",
            lambda s: s.early_stopping is None or s.objective.metric == "evalLoss",
            "compares running trials by evalLoss: objective.metric must be evalLoss",
            "earlyStopping",
        ),
        Rule(
            "!has(self.earlyStopping) || !has(self.objective.direction) || self.objective.direction == 'minimize'",
            lambda s: s.early_stopping is None or s.objective.minimizes,
            "must be minimize with earlyStopping",
            "objective.direction",
        ),
        Rule(
            "!has(self.earlyStopping) ||"
            " self.earlyStopping.rungs.all(rung, rung % self.template.evaluation.everySteps == 0)",
            lambda s: (
                s.early_stopping is None
                or all(rung % s.template.evaluation.every_steps == 0 for rung in s.early_stopping.rungs)
            ),
            "must be multiples of template.evaluation.everySteps",
            "earlyStopping.rungs",
        ),
        Rule(
            "!self.template.suspend",
            lambda s: not s.template.suspend,
            "must be false: suspend the sweep",
            "template.suspend",
        ),
        Rule(
            "!has(self.template.ttlSecondsAfterFinished)",
            lambda s: s.template.ttl_seconds_after_finished is None,
            "must not be set: trials go with their sweep, so give it a ttlSecondsAfterFinished",
            "template.ttlSecondsAfterFinished",
        ),
    )

    template: FineTuneJobSpec
    """The spec that all trials start from. Trial t publishes to output.uri/t/."""
    parameters: Annotated[list[Parameter], _keyed("path", 16)] | None = None
    """Fields to vary."""
    trials: Annotated[list[Trial], _keyed("name", MAX_TRIALS)] | None = None
    """Trials by name, in the order of their start."""
    strategy: Literal["grid", "random", "tpe"] = "grid"
    """How parameters become trials: grid tries every combination, random draws maxTrials of them, tpe too, each when it
    starts, from the results so far (Optuna)."""
    max_trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] | None = None
    """Number of trials that random or tpe draws."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seed of the draw. Default: 42."""
    objective: Objective = Field(default_factory=Objective)
    """What makes one trial better than another."""
    early_stopping: Halving | None = None
    """Stop trials that fall behind. Off unless given."""
    parallelism: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = 4
    """Trials that run at the same time. May be changed at any time."""
    suspend: bool = False
    """Stop all trials after saving a checkpoint, and free their GPUs; false again resumes them there."""
    active_deadline_seconds: Seconds | None = None
    """Stop all trials this long after the sweep started, suspended or not; the best so far stays the best."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Delete the sweep and its FineTuneJobs (never an adapter) this long after it ended."""

    @property
    def drawn_with(self) -> int:
        """The seed."""
        return 42 if self.seed is None else self.seed


#: Fields that may not change once the sweep has started (CEL rules in crd_sweep.py).
FROZEN = ("template", "parameters", "trials", "strategy", "maxTrials", "seed", "objective", "earlyStopping")


class SweepMetadata(Metadata):
    """The part of ObjectMeta that a sweep's own rules look at."""

    name: SweepName  # type: ignore[valid-type]


class FineTuneSweep(ApiModel):
    """Many fine-tuning runs that differ in a few fields: one FineTuneJob each, compared by one metric."""

    api_version: Literal["finetune.dev/v1alpha1"]
    kind: Literal["FineTuneSweep"]
    metadata: SweepMetadata
    spec: FineTuneSweepSpec
    status: dict[str, Any] | None = None
