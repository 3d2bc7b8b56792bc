"""FineTuneJob's status, and the report a trainer gives of itself (the source of most of it)."""

import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from finetune_api.artifact_names import ArtifactName
from finetune_api.base import ApiModel, FiniteOrNone
from finetune_api.gate import MAX_CHECKS, GateCheck
from finetune_api.spec_pack import MAX_PACK
from finetune_api.trial_report import TrialReport, TrialReports
from finetune_api.uri import MAX_LENGTH as MAX_URI_LENGTH

#: At most what every JSON reader keeps exactly: the API server refuses a status with a larger integer.
Count = Annotated[int, Field(ge=0, le=2**53)]


def _plausible(moment: datetime) -> datetime:
    """With a zone, and far enough from the end of time to count on from there."""
    if moment.year > 9000:
        raise ValueError("must be before the year 9000")
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Time = Annotated[datetime, AfterValidator(_plausible)]


def _finite(values: Any) -> Any:
    """Return the mapping without NaN and infinity: JSON has neither, so they would make a whole status unwritable."""
    if not isinstance(values, dict):
        return values
    return {key: value for key, value in values.items() if not _is_no_number(value)}


def _is_no_number(value: Any) -> bool:
    try:
        return isinstance(value, float | str) and not math.isfinite(float(value))
    except ValueError:
        return False


MAX_METRICS = 256
_MAX_METRIC_NAME = 128


def _numbers(values: Any) -> Any:
    """Like `_finite`, without null, which is how some writers say NaN, and no more than MAX_METRICS."""
    found = _finite(values)
    if not isinstance(found, dict):
        return found
    kept = [(key, value) for key, value in found.items() if value is not None and len(str(key)) <= _MAX_METRIC_NAME]
    return dict(kept[:MAX_METRICS])


Metrics = Annotated[dict[str, float], Field(max_length=MAX_METRICS), BeforeValidator(_numbers)]


def _cut_to(length: int) -> BeforeValidator:
    return BeforeValidator(lambda value: value[:length] if isinstance(value, str) else value)


Gpu = Annotated[str, Field(max_length=63), _cut_to(63)]


class StatusModel(ApiModel):
    """Written by our own code and read back over versions: unknown fields are skipped, times are parsed."""

    model_config = ConfigDict(extra="ignore", strict=False)


ConditionType = Literal["Accepted", "Scheduled", "Training", "Suspended", "Published", "Succeeded", "Finished"]
ConditionStatus = Literal["True", "False", "Unknown"]


class Condition(StatusModel):
    """A condition, after metav1.Condition."""

    type: ConditionType
    """What is said."""
    status: ConditionStatus
    """Whether it holds."""
    reason: Annotated[str, Field(min_length=1, max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """Why, in one CamelCase word."""
    message: Annotated[str, Field(max_length=32768)] = ""
    """Why, in a sentence."""
    last_transition_time: Time
    """When status last changed."""
    observed_generation: Count = 0
    """metadata.generation this was decided for."""


class Progress(StatusModel):
    """How far the training is."""

    step: Count = 0
    """Optimizer steps done."""
    total_steps: Count | None = None
    """Optimizer steps in all."""
    summary: Annotated[str, Field(max_length=64)] = ""
    """'step/totalSteps', for printing."""
    percent: Annotated[float, Field(ge=0, le=100)] | None = None
    """100 * step / totalSteps."""
    epoch: float | None = None
    """Passes over the data so far."""
    loss: float | None = None
    """Latest training loss (nats per token)."""
    eval_loss: float | None = None
    """Latest evaluation loss (nats per token)."""
    learning_rate: float | None = None
    """Learning rate of the latest step."""
    tokens_per_second: float | None = None
    """Real tokens, never padding, over all GPUs."""
    estimated_completion_time: Time | None = None
    """When the last step should be done."""
    updated_at: Time | None = None
    """When the trainer said so."""

    @model_validator(mode="before")
    @classmethod
    def _drop_no_numbers(cls, values: Any) -> Any:
        return _finite(values)


class ExecutionPlan(StatusModel):
    """How the trainer lays the run out on the GPUs."""

    micro_batch_size: Count | None = None
    """Sequences per GPU in one forward pass."""
    gradient_accumulation_steps: Count | None = None
    """Forward passes per optimizer step."""
    world_size: Count | None = None
    """Processes (one per GPU)."""
    sharded: bool | None = None
    """Whether each GPU holds only its part of the base model's weights, for no GPU can hold them all."""
    gradient_checkpointing: bool | None = None
    """Whether all activations of some decoder layers are recomputed."""
    checkpointed_layers: Count | None = None
    """Decoder layers whose activations are recomputed."""
    selective_checkpointing: bool | None = None
    """Whether decoder layers recompute what adapters read: norms and dropout."""
    cached_layers: Count | None = None
    """Decoder layers whose 4-bit weights are kept dequantized."""
    packing: bool | None = None
    """Whether rows are laid end to end."""
    tokens_per_pass: Count | None = None
    """The most tokens of one forward pass, padding included."""
    compiled: bool | None = None
    """Whether the decoder layers are compiled."""
    captured: bool | None = None
    """Whether forward and backward passes are replayed as CUDA graphs."""
    fp8: bool | None = None
    """Whether products with the cached layers' weights are in FP8."""
    attention: Annotated[str, Field(max_length=64)] | None = None
    """Attention implementation in use."""
    predicted_peak_memory_bytes: Count | None = None
    """GPU memory the plan expects."""
    measured_peak_memory_bytes: Count | None = None
    """GPU memory the run reached."""


class Adapter(StatusModel):
    """The published adapter."""

    uri: Annotated[str, Field(max_length=MAX_URI_LENGTH)]
    """Prefix that holds it: output.uri."""
    manifest_digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    """sha256:<hex> of manifest.json, which in turn holds the digest of every file."""
    size_bytes: Count
    """Bytes of all files in the manifest."""
    base_model: Annotated[str, Field(max_length=MAX_URI_LENGTH)]
    """Model the adapter belongs to."""
    rank: Count
    """LoRA rank."""


class Artifact(StatusModel):
    """What was made of the adapter besides."""

    name: ArtifactName
    """Which of output.artifacts."""
    uri: Annotated[str, Field(max_length=MAX_URI_LENGTH)] | None = None
    """Prefix that holds it; absent if it was not published."""
    manifest_digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")] | None = None
    """sha256:<hex> of its manifest.json."""
    size_bytes: Count | None = None
    """Bytes of all files in that manifest."""
    loss: FiniteOrNone = None
    """Loss on held-out rows (nats per token) of what was published, loaded back."""
    adapter_loss: FiniteOrNone = None
    """The trained model's loss on the same rows."""
    message: Annotated[str, _cut_to(256), Field(max_length=256)] | None = None
    """Why it was not published."""


class Resumption(StatusModel):
    """The checkpoint that a trainer went on from."""

    step: Count
    """Optimizer steps it holds."""
    job_uid: Annotated[str, Field(max_length=64)] | None = None
    """Uid of the FineTuneJob that saved it, where that is another one: an earlier job with the same checkpoints."""


class Attempt(StatusModel):
    """One attempt: one batch/v1 Job."""

    job_name: Annotated[str, Field(max_length=253), _cut_to(253)]
    """Name of the Job."""
    job_uid: Annotated[str, Field(max_length=64)] | None = None
    """Uid of the Job that the operator created. Any other Job of that name is somebody else's."""
    reason: Annotated[str, Field(max_length=128), _cut_to(128)] | None = None
    """How it ended (Succeeded, DatasetInvalid, Preempted, …); absent while it runs."""
    message: Annotated[str, Field(max_length=1024), _cut_to(1024)] | None = None
    """How it ended, in a sentence."""
    exit_code: int | None = None
    """The trainer's exit code."""
    node: Annotated[str, Field(max_length=253)] | None = None
    """Node of the pod that explains how it ended."""
    gpu: Gpu | None = None
    """GPU that it runs on: the node label nvidia.com/gpu.product that it requires, else as its trainer sees it."""
    started_at: Time | None = None
    """When its first pod started; until then, when the Job was created."""
    finished_at: Time | None = None
    """When it ended."""
    last_step: Count | None = None
    """Last optimizer step it reported."""
    stage: Annotated[str, Field(max_length=64)] | None = None
    """What its trainer was last known to do (LoadingModel, Training, …)."""
    heard_at: Time | None = None
    """When its trainer last reported another step or stage."""
    run_seconds: Count | None = None
    """Seconds in which its pods ran, up to ranUntil: waits in a queue or for another pod are left out."""
    ran_until: Time | None = None
    """When the last of its pods that has ended did so."""
    micro_batch_size: Count | None = None
    """Micro-batch it ran with."""
    resumed_from: Resumption | None = None
    """Checkpoint that its latest pod went on from; absent where it began at step 0."""
    disruptions: Count | None = None
    """Pods of it that Kubernetes evicted or preempted, or whose node went away."""
    disrupted_at: Time | None = None
    """When that last happened."""
    disruption: Annotated[str, Field(max_length=512)] | None = None
    """Why it last happened."""


class EarlierAttempts(StatusModel):
    """What is kept of attempts that are no longer listed."""

    count: Count = 0
    """How many they are."""
    run_seconds: Count = 0
    """Seconds in which their pods ran."""


MAX_USAGE = 1e12
_Amount = Annotated[float, Field(ge=0, le=MAX_USAGE)]


class Usage(StatusModel):
    """What the attempts that have ended used."""

    gpu_hours: _Amount = 0.0
    """GPUs multiplied by the hours that their pods ran."""
    cost: _Amount | None = None
    """Price of priced_gpu_hours, each attempt's at the price in force when it ended; absent where none has a price."""
    currency: Annotated[str, Field(max_length=16)] | None = None
    """Currency of cost, as the administrator names it."""
    priced_gpu_hours: _Amount | None = None
    """The part of gpuHours that cost covers: the administrator gave a price for those GPUs."""


class FineTuneJobStatus(StatusModel):
    """Where the job stands and why."""

    phase: Annotated[str, Field(max_length=128), _cut_to(128)] | None = None
    """One word for printing; programs read the conditions."""
    observed_generation: Count | None = None
    """metadata.generation this status was computed for."""
    conditions: Annotated[
        list[Condition],
        Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
    ] = []
    """Accepted, Scheduled, Training, Suspended, Published, the summary Succeeded, and Finished: True once the job
    is over, either way."""
    progress: Progress | None = None
    """How far the training is."""
    execution_plan: ExecutionPlan | None = None
    """How the run is laid out on the GPUs."""
    attempts: list[Attempt] = []
    """The attempts so far, oldest first; of those that do not count as failures, the latest."""
    earlier_attempts: EarlierAttempts | None = None
    """Attempts that are no longer listed."""
    usage: Usage | None = None
    """What the attempts that have ended used."""
    metrics: Metrics | None = None
    """Final values (trainLoss, evalLoss, accuracy, …; the same with Before: ahead of training). Kept for good."""
    adapter: Adapter | None = None
    """The published adapter."""
    candidate: Adapter | None = None
    """The adapter of a job that did not meet publish.onlyIf: kept whole and verified, but not published."""
    gate: Annotated[list[GateCheck], Field(max_length=MAX_CHECKS)] = []
    """What became of each condition in publish.onlyIf."""
    artifacts: Annotated[
        list[Artifact],
        Field(
            max_length=8, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]}
        ),
    ] = []
    """What was made of it besides (output.artifacts), and what failed."""
    trials: Annotated[
        list[TrialReport],
        Field(
            max_length=MAX_PACK,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
        ),
    ] = []
    """The trials of spec.pack, in their order. The adapter of each that succeeded lies at output.uri/<name>/."""
    start_time: Time | None = None
    """When the first attempt was created."""
    completion_time: Time | None = None
    """When the job ended."""


#: What a live trainer does, in order; also the phases of a job whose pods run.
RunningStage = Literal[
    "Starting",
    "CheckingData",
    "LoadingModel",
    "Training",
    "Evaluating",
    "Publishing",
    "Verifying",
]
Stage = Literal[RunningStage, "Succeeded", "Failed"]


class TrainerReport(StatusModel):
    """What a trainer says of itself: the body of /progress, and, at the end, of its termination message.

    That has at most 1.5 KiB; of a process that trains several trials 4 KiB.
    """

    stage: Stage = "Starting"
    """What it is doing."""
    reason: Annotated[str, _cut_to(64)] | None = None
    """At the end: the outcome, as in names.REASONS."""
    message: Annotated[str, _cut_to(4096)] = ""
    """What it is doing, or why it failed, in a sentence."""
    progress: Progress = Field(default_factory=Progress)
    """How far the training is."""
    execution_plan: ExecutionPlan | None = None
    """Known once the plan is made."""
    metrics: Metrics = {}
    """Latest values of every metric, as in status.metrics."""
    adapter: Adapter | None = None
    """Once published."""
    candidate: Adapter | None = None
    """In its place, where the adapter did not meet publish.onlyIf."""
    gate: Annotated[list[GateCheck], Field(max_length=MAX_CHECKS)] = []
    """Once each condition of publish.onlyIf is decided."""
    artifacts: Annotated[list[Artifact], Field(max_length=8)] = []
    """What was made of it besides, and what failed."""
    resumed_from: Resumption | None = None
    """Once the checkpoint to go on from is chosen."""
    gpu: Gpu | None = None
    """Once the GPU is taken: its name, with dashes for spaces."""
    trials: TrialReports = []
    """Of a process that trains several, each of them."""
