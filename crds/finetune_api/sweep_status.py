"""FineTuneSweep's status: one small row for each trial that has started; the rest is in its FineTuneJob."""

from typing import Annotated

from pydantic import Field

from finetune_api.status import Condition, Count, StatusModel, Time
from finetune_api.sweep import MAX_TRIALS
from finetune_api.trial_report import TrialPhase
from finetune_api.uri import MAX_LENGTH as MAX_URI_LENGTH

#: Of a row: a thousand of them must fit into one object.
MAX_VALUES = 160


class TrialStatus(StatusModel):
    """One trial. Its progress, metrics and adapter are in the status of its FineTuneJob."""

    name: Annotated[str, Field(max_length=64)]
    """Name of the trial."""
    values: Annotated[str, Field(max_length=MAX_VALUES)] = ""
    """What differs from the template, shortened."""
    job_name: Annotated[str, Field(max_length=64)] | None = None
    """Name of the FineTuneJob that it shares with other trials. Absent: it has one of its own, <sweep>-<trial>."""
    phase: TrialPhase = "Pending"
    """Where it stands. Stopped: its sweep ended it early, after a checkpoint."""
    reason: Annotated[str, Field(max_length=128)] | None = None
    """Why it failed or was stopped, in one CamelCase word."""
    value: float | None = None
    """Final value of the objective's metric."""
    rungs: Annotated[list[float], Field(max_length=16)] | None = None
    """Its evalLoss at each rung of earlyStopping that it has passed."""


class BestTrial(StatusModel):
    """The best of the trials that succeeded."""

    trial: Annotated[str, Field(max_length=64)]
    """Name of the trial."""
    job_name: Annotated[str, Field(max_length=64)]
    """Name of its FineTuneJob, which may be that of other trials, too."""
    value: float
    """Its value of the objective's metric."""
    uri: Annotated[str, Field(max_length=MAX_URI_LENGTH)] | None = None
    """Where its adapter lies."""


class TrialCounts(StatusModel):
    """How many trials stand where."""

    total: Count = 0
    """All trials."""
    waiting: Count = 0
    """Not started."""
    active: Count = 0
    """Started and not ended."""
    succeeded: Count = 0
    """Published an adapter."""
    stopped: Count = 0
    """Ended early by the sweep."""
    failed: Count = 0
    """Failed, or deleted by somebody before they ended."""


class FineTuneSweepStatus(StatusModel):
    """Where the sweep stands, and what is best so far."""

    phase: str | None = None
    """One word for printing; programs read the conditions."""
    observed_generation: Count | None = None
    """metadata.generation this status was computed for."""
    conditions: Annotated[
        list[Condition],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = []
    """Accepted, Suspended, and the summary Succeeded."""
    summary: Annotated[str, Field(max_length=64)] = ""
    """'ended/total', for printing."""
    packed_for: Count | None = None
    """spec.parallelism at the start, for which trials were put into shared FineTuneJobs. Absent: each has its own."""
    counts: TrialCounts = Field(default_factory=TrialCounts)
    """How many trials stand where."""
    best: BestTrial | None = None
    """The best trial so far."""
    trials: Annotated[
        list[TrialStatus],
        Field(
            max_length=MAX_TRIALS,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    """The trials that have started, in their order."""
    start_time: Time | None = None
    """When the sweep was accepted. From then on its trials do not change."""
    completion_time: Time | None = None
    """When it ended."""
