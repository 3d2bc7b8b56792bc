"""FineTuneSweep and its spec: one template, many trials. A field's docstring is its description in the CRD."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Rule
from finetune_api.fields import Seconds, Switch, each_once, text_type
from finetune_api.patterns import TextRule
from finetune_api.spec import FineTuneJobSpec, Metadata
from finetune_api.spec_pack import Halving, Objective, SweepName, TrialName

#: Trials of one sweep: each has a row in its status, which must fit into one object.
MAX_TRIALS = 1000
_PATH = TextRule(
    r"^[a-z][A-Za-z0-9]*([.][a-z][A-Za-z0-9]*)*$",
    "must be a path of a FineTuneJob's spec, such as training.learningRate",
)
ParameterPath = text_type(_PATH, max_length=128)
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

    name: TrialName
    """Its name: its FineTuneJob is called after the sweep and it, and its adapter lies in a folder of this name."""
    values: Annotated[dict[str, AnyValue], Field(max_length=32)] = {}
    """What differs from the template: the value at each path of a FineTuneJob's spec."""


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
        Rule(
            "!has(self.template.pack)",
            lambda s: s.template.pack is None,
            "must not be set: a sweep packs its trials itself, as spec.packing says",
            "template.pack",
        ),
    )

    template: FineTuneJobSpec
    """The spec that all trials start from. Trial t publishes to output.uri/t/."""
    parameters: Annotated[list[Parameter], _keyed("path", 16), each_once("path")] | None = None
    """Fields to vary."""
    trials: Annotated[list[Trial], _keyed("name", MAX_TRIALS), each_once("name")] | None = None
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
    packing: Switch = "auto"
    """Whether compatible trials share a FineTuneJob, and so one GPU and one base model: auto where that is faster,
    enabled wherever it is possible (a sweep of which one trial can share with no other is refused), disabled never."""
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
FROZEN = ("template", "parameters", "trials", "strategy", "maxTrials", "seed", "objective", "earlyStopping", "packing")


class SweepMetadata(Metadata):
    """The part of ObjectMeta that a sweep's own rules look at."""

    name: SweepName


class FineTuneSweep(ApiModel):
    """Many fine-tuning runs that differ in a few fields: one FineTuneJob each, compared by one metric."""

    api_version: Literal["finetune.dev/v1alpha1"]
    kind: Literal["FineTuneSweep"]
    metadata: SweepMetadata
    spec: FineTuneSweepSpec
    status: dict[str, Any] | None = None
