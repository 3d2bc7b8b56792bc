"""FineTuneJob's spec. A field's docstring is its description in the CRD and in the API reference.

Defaults are the recipe: QLoRA for chain-of-thought NLI on Mistral-7B-v0.3 (Dettmers et al. 2023, arXiv:2305.14314).
"""

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from finetune_api import names
from finetune_api.base import ApiModel, Quantity, ReadableUri, Rule, WritableUri

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$")]
Text = Annotated[str, Field(min_length=1, max_length=256)]
Switch = Literal["auto", "enabled", "disabled"]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seconds = Annotated[int, Field(ge=1, le=2**31 - 1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


_MICRO_BATCH_MESSAGE = "must be auto or a number from 1 to 65536"


def _check_micro_batch(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65_536):
        raise PydanticCustomError("micro_batch", _MICRO_BATCH_MESSAGE)
    return value


MicroBatchSize = Annotated[
    int | Literal["auto"],
    BeforeValidator(_check_micro_batch),
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "x-kubernetes-validations": [
                {
                    "rule": "type(self) == string ? self == 'auto' : (self >= 1 && self <= 65536)",
                    "message": _MICRO_BATCH_MESSAGE,
                }
            ],
        }
    ),
]


class SecretRef(ApiModel):
    """A Secret of the job's namespace. The operator never reads it: pods mount it."""

    name: Name
    """Name of the Secret."""


class Model(ApiModel):
    """The base model."""

    RULES: ClassVar = (
        Rule(
            "!self.trustRemoteCode || (has(self.revision) && self.revision.matches('^[0-9a-f]{40}$'))",
            lambda m: not m.trust_remote_code or re.fullmatch("[0-9a-f]{40}", m.revision or "") is not None,
            "needs model.revision to be a full commit hash (40 hexadecimal digits), so that the code cannot change",
            "trustRemoteCode",
        ),
    )

    source: ReadableUri
    """Where the model lies: hf://owner/name, or a folder at s3://, pvc:// or file:// (safetensors only)."""
    revision: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")] | None = None
    """Branch, tag or commit of a hub model. Pin a commit to make the run repeatable."""
    secret_ref: SecretRef | None = None
    """Secret with HF_TOKEN for gated models, or AWS_* keys for s3://."""
    trust_remote_code: bool = False
    """Run Python code that the model's repository brings. Needs the administrator's permission and a pinned commit."""
    attention: Literal["auto", "flash_attention_2", "varlen", "sdpa", "eager"] = "auto"
    """Attention implementation. auto takes the fastest that is installed and says which."""


class Dataset(ApiModel):
    """Training and evaluation rows: JSON Lines, JSON, CSV or Parquet; a file, or a prefix holding many."""

    train: ReadableUri
    """Training rows."""
    eval: ReadableUri | None = None
    """Held-out rows for the evaluation loss, early stopping and keepBest."""
    format: Literal["auto", "text", "prompt-completion", "messages"] = "auto"
    """Shape of a row. auto looks at the columns: text, prompt and completion, or messages."""
    text_field: Text = "text"
    """Column that holds the whole text, when the format is text."""
    secret_ref: SecretRef | None = None
    """Secret with AWS_* keys or HF_TOKEN for the data."""


class Quantization(ApiModel):
    """How the frozen base weights are stored (bitsandbytes)."""

    bits: Literal[4, 8, 16] = 4
    """4 is QLoRA, 8 is LLM.int8, 16 is plain LoRA."""
    type: Literal["nf4", "fp4"] = "nf4"
    """4-bit data type: NormalFloat or float."""
    double_quant: bool = True
    """Quantize the quantization constants too (saves about 0.4 bit per weight)."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type that weights are dequantized to for matrix products."""


class Lora(ApiModel):
    """The adapter (Hu et al. 2021, arXiv:2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank r of the update matrices."""
    alpha: Annotated[int, Field(ge=1, le=4096)] = 32
    """Scale: the update is multiplied by alpha / rank."""
    dropout: Fraction = 0.05
    """Dropout before the first update matrix."""
    target_modules: Annotated[list[Text], Field(min_length=1, max_length=64)] = ["q_proj", "k_proj", "v_proj", "o_proj"]
    """Names of the linear layers that get an adapter; [all-linear] takes every one but the head."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases train."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA, arXiv:2312.03732)."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv:2402.09353)."""
    init_from: ReadableUri | None = None
    """Adapter to continue from. Its rank and target modules must be this job's."""


class Training(ApiModel):
    """The optimization."""

    epochs: Annotated[float, Field(gt=0, le=10_000)] = 3
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps, whatever epochs says."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 16
    """Effective batch: sequences per optimizer step, over all GPUs. It never changes by itself."""
    micro_batch_size: MicroBatchSize = "auto"
    """Sequences per GPU in one forward pass. auto takes what fits; gradient accumulation makes up the rest."""
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 2e-4
    """Peak learning rate."""
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Learning rate schedule."""
    warmup_ratio: Fraction = 0.03
    """Part of all steps over which the learning rate rises from 0."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Decoupled weight decay."""
    optimizer: Literal[
        "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused", "adafactor"
    ] = "paged_adamw_8bit"
    """Optimizer, by transformers' names."""
    max_grad_norm: Annotated[float, Field(gt=0, le=1_000_000)] = 1.0
    """Gradients are clipped to this norm."""
    max_length: Annotated[int, Field(ge=8, le=1_048_576)] = 512
    """Tokens per row; longer rows are cut, and the log says how many were."""
    packing: Switch = "auto"
    """Lay several rows end to end without padding. Rows never see each other."""
    gradient_checkpointing: Switch = "auto"
    """Recompute activations in the backward pass to save memory. auto does so only when it must."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 42
    """Seed of every random generator."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Mixed precision of the training step."""


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


class Checkpoint(ApiModel):
    """Saved states to resume from."""

    every_steps: PositiveInt = 500
    """Optimizer steps between checkpoints. One is also saved when the pod is asked to stop."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Checkpoints to keep; older ones are deleted."""
    uri: WritableUri | None = None
    """Where checkpoints go. Default: checkpoints/ under output.uri."""


class Wandb(ApiModel):
    """Weights & Biases."""

    project: Text
    """Project."""
    name: Text | None = None
    """Run name. Default: the job's name."""
    entity: Text | None = None
    """Team or user."""
    secret_ref: SecretRef | None = None
    """Secret with WANDB_API_KEY."""


class Logging(ApiModel):
    """What the run reports, and how often."""

    every_steps: PositiveInt = 10
    """Optimizer steps between log lines and metric updates."""
    wandb: Wandb | None = None
    """Off unless given."""


class Toleration(ApiModel):
    """A pod toleration, as in Kubernetes."""

    key: Annotated[str, Field(max_length=317)] | None = None
    """Taint key; empty with operator Exists matches all."""
    operator: Literal["Exists", "Equal"] | None = None
    """Exists or Equal (the default)."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Taint value, for Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect to tolerate; empty means all."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """For NoExecute: how long."""


class Resources(ApiModel):
    """What each pod asks for and where it may run."""

    nodes: Annotated[int, Field(ge=1, le=512)] = 1
    """Pods, one a node."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs per pod. 0 trains on the CPU, for trials."""
    gpu_resource: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")] = (
        "nvidia.com/gpu"
    )
    """Extended resource that stands for one GPU."""
    cpu: Quantity | None = None
    """CPU request."""
    memory: Quantity | None = None
    """Memory request and limit."""
    shared_memory: Quantity = "8Gi"
    """Size of /dev/shm (a memory-backed volume; NCCL needs more than the default 64 MiB)."""
    node_selector: Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=32)] | None = None
    """Node labels to require."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = None
    """Taints to tolerate."""
    affinity: (
        Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})] | None
    ) = None
    """Pod affinity, as in Kubernetes."""
    priority_class_name: Name | None = None
    """PriorityClass of the pods."""
    runtime_class_name: Name | None = None
    """RuntimeClass of the pods."""


class Cache(ApiModel):
    """A volume shared by jobs for models, data sets and compiled kernels."""

    claim_name: Name
    """PersistentVolumeClaim of the job's namespace."""


class Output(ApiModel):
    """Where the adapter goes."""

    uri: WritableUri
    """Prefix that will hold the adapter. Its manifest.json is written last: where it is, the adapter is whole."""
    secret_ref: SecretRef | None = None
    """Secret with AWS_* keys for the output and the checkpoints."""
    overwrite: bool = False
    """Replace an adapter that is already there. Otherwise the job refuses to start."""
    keep_checkpoints: bool = False
    """Leave the checkpoints in place after success."""


class Recovery(ApiModel):
    """What happens after a failed attempt that another one could mend."""

    max_attempts: Annotated[int, Field(ge=1, le=100)] = 4
    """Attempts in all. Preemptions are not counted."""
    on_out_of_memory: Literal["ReduceMicroBatch", "Fail"] = "ReduceMicroBatch"
    """After a GPU out-of-memory: halve the micro-batch (same effective batch), or fail."""
    backoff_seconds: Annotated[int, Field(ge=0, le=86_400)] = 10
    """Wait before the second attempt; it doubles each time, up to ten minutes."""


_EVAL_NEEDED = "needs held-out rows: set dataset.eval"


def _world_size(spec: Any) -> int:
    return int(spec.resources.nodes * max(1, spec.resources.gpus_per_node))


def _micro(spec: Any) -> int:
    micro = spec.training.micro_batch_size
    return micro if isinstance(micro, int) else 1


class FineTuneJobSpec(ApiModel):
    """What to train, on what, and where the adapter goes. Only model, dataset and output are needed."""

    RULES: ClassVar = (
        Rule(
            "!has(self.evaluation.earlyStopping) || has(self.dataset.eval)",
            lambda s: s.evaluation.early_stopping is None or s.dataset.eval is not None,
            _EVAL_NEEDED,
            "evaluation.earlyStopping",
        ),
        Rule(
            "!('nli' in self.evaluation.metrics) || has(self.dataset.eval)",
            lambda s: "nli" not in s.evaluation.metrics or s.dataset.eval is not None,
            _EVAL_NEEDED,
            "evaluation.metrics",
        ),
        Rule(
            "!has(self.evaluation.earlyStopping) || self.evaluation.earlyStopping.metric == 'evalLoss'"
            " || 'nli' in self.evaluation.metrics",
            lambda s: (
                s.evaluation.early_stopping is None
                or s.evaluation.early_stopping.metric == "evalLoss"
                or "nli" in s.evaluation.metrics
            ),
            "accuracy and f1 are measured only when evaluation.metrics holds nli",
            "evaluation.earlyStopping",
        ),
        Rule(
            "self.training.batchSize % (self.resources.nodes * (self.resources.gpusPerNode > 0 ?"
            " self.resources.gpusPerNode : 1) * (type(self.training.microBatchSize) == int ?"
            " int(self.training.microBatchSize) : 1)) == 0",
            lambda s: s.training.batch_size % (_world_size(s) * _micro(s)) == 0,
            "must be a multiple of microBatchSize (1 when auto) times resources.nodes times resources.gpusPerNode",
            "training.batchSize",
        ),
        Rule(
            "self.quantization.bits != 8 || !self.lora.dora",
            lambda s: s.quantization.bits != 8 or not s.lora.dora,
            "needs quantization.bits 4 or 16",
            "lora.dora",
        ),
        Rule(
            "!has(self.lora.initFrom) || self.lora.initFrom != self.output.uri",
            lambda s: s.lora.init_from != s.output.uri,
            "must differ from lora.initFrom, which would be replaced while it is read",
            "output.uri",
        ),
    )

    model: Model
    """The base model."""
    dataset: Dataset
    """The rows to train and evaluate on."""
    quantization: Quantization = Field(default_factory=Quantization)
    """How the frozen base weights are stored."""
    lora: Lora = Field(default_factory=Lora)
    """The adapter."""
    training: Training = Field(default_factory=Training)
    """The optimization."""
    evaluation: Evaluation = Field(default_factory=Evaluation)
    """What is measured on dataset.eval."""
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    """Saved states to resume from."""
    logging: Logging = Field(default_factory=Logging)
    """What the run reports."""
    resources: Resources = Field(default_factory=Resources)
    """What each pod asks for."""
    cache: Cache | None = None
    """Volume shared by jobs for models and data sets. Off unless given."""
    output: Output
    """Where the adapter goes."""
    recovery: Recovery = Field(default_factory=Recovery)
    """What happens after a failed attempt."""
    image: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$")] | None = None
    """Trainer image. Default: the operator's."""
    suspend: bool = False
    """Stop after saving a checkpoint, and free the GPUs; false again resumes there."""
    active_deadline_seconds: Seconds | None = None
    """Fail the job when its attempts have run for this long in all."""
    pending_deadline_seconds: Seconds | None = None
    """Fail the job when its pods have waited this long to start."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Delete the FineTuneJob (never the adapter) this long after it ended."""


#: Sections of the spec that may not change once an attempt exists (CEL transition rules in crd.py).
IMMUTABLE = (
    "model",
    "dataset",
    "quantization",
    "lora",
    "training",
    "evaluation",
    "checkpoint",
    "logging",
    "resources",
    "cache",
    "output",
    "image",
    "pendingDeadlineSeconds",
)


class Metadata(ApiModel):
    """The part of ObjectMeta that a job's own rules look at; the rest is kept as it is."""

    model_config = {"extra": "allow"}

    name: Annotated[str, Field(min_length=1, max_length=names.MAX_NAME_LENGTH, pattern=names.NAME_PATTERN)]
    namespace: str | None = None
    uid: str | None = None
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class FineTuneJob(ApiModel):
    """One fine-tuning run: a base model and a data set in, a verified LoRA adapter out."""

    api_version: Literal["finetune.dev/v1alpha1"]
    kind: Literal["FineTuneJob"]
    metadata: Metadata
    spec: FineTuneJobSpec
    status: dict[str, Any] | None = None
