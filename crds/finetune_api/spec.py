"""FineTuneJob and its spec. A field's docstring is its description in the CRD and in the API reference.

The sections are models of their own: spec_data.py, spec_training.py, spec_evaluation.py and spec_runtime.py.
Defaults are the recipe: QLoRA for chain-of-thought NLI on Mistral-7B-v0.3 (Dettmers et al. 2023, arXiv:2305.14314).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from finetune_api.base import ApiModel, Rule
from finetune_api.fields import Image, JobName, Seconds
from finetune_api.places import PLACES
from finetune_api.spec_data import (
    Cache,
    Dataset,
    Model,
    Output,
)
from finetune_api.spec_evaluation import Evaluation, Generation
from finetune_api.spec_pack import Pack
from finetune_api.spec_publish import LOSS, Publish
from finetune_api.spec_runtime import (
    Checkpoint,
    Logging,
    Recovery,
    Resources,
)
from finetune_api.spec_training import Lora, Quantization, Training

__all__ = ["IMMUTABLE", "FineTuneJob", "FineTuneJobSpec", "Generation", "Metadata"]

_EVAL_NEEDED = "needs held-out rows: set dataset.eval or dataset.evalFraction"
_HOLDS_OUT = "(has(self.dataset.eval) || has(self.dataset.evalFraction))"


def _world_size(spec: Any) -> int:
    return int(spec.resources.nodes * max(1, spec.resources.gpus_per_node))


def _micro(spec: Any) -> int:
    micro = spec.training.micro_batch_size
    return micro if isinstance(micro, int) else 1


class FineTuneJobSpec(ApiModel):
    """What to train, on what, and where the adapter goes. Only model, dataset and output are needed."""

    RULES: ClassVar = (
        Rule(
            f"!has(self.evaluation.earlyStopping) || {_HOLDS_OUT}",
            lambda s: s.evaluation.early_stopping is None or s.dataset.holds_out,
            _EVAL_NEEDED,
            "evaluation.earlyStopping",
        ),
        Rule(
            f"!('nli' in self.evaluation.metrics) || {_HOLDS_OUT}",
            lambda s: "nli" not in s.evaluation.metrics or s.dataset.holds_out,
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
            f"!has(self.publish) || {_HOLDS_OUT}",
            lambda s: s.publish is None or s.dataset.holds_out,
            _EVAL_NEEDED,
            "publish.onlyIf",
        ),
        Rule(
            "!has(self.publish) || 'nli' in self.evaluation.metrics"
            " || self.publish.onlyIf.all(each, each.metric == 'evalLoss')",
            lambda s: (
                s.publish is None
                or "nli" in s.evaluation.metrics
                or all(each.metric == LOSS for each in s.publish.only_if)
            ),
            "metrics other than evalLoss are measured only when evaluation.metrics holds nli",
            "publish.onlyIf",
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
            "!has(self.dataset.addTokens) || self.lora.embeddings || has(self.lora.modulesToSave)",
            lambda s: not s.dataset.add_tokens or s.lora.embeddings or bool(s.lora.modules_to_save),
            "needs lora.embeddings: true, or lora.modulesToSave with the model's embeddings: a new token says nothing"
            " until its embedding is trained",
            "dataset.addTokens",
        ),
        Rule(
            "self.quantization.bits != 8 || !self.lora.dora",
            lambda s: s.quantization.bits != 8 or not s.lora.dora,
            "needs quantization.bits 4 or 16",
            "lora.dora",
        ),
        *PLACES,
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
    publish: Publish | None = None
    """What the adapter must reach on held-out rows to be published. Off unless given."""
    recovery: Recovery = Field(default_factory=Recovery)
    """What happens after a failed attempt."""
    pack: Pack | None = None
    """Trials of a FineTuneSweep that train in this job's process. Set by the sweep: write a FineTuneSweep."""
    image: Image | None = None
    """Trainer image. Default: the operator's. May be changed until a pod of the job has run."""
    suspend: bool = False
    """Stop after saving a checkpoint, and free the GPUs; false again resumes there."""
    active_deadline_seconds: Seconds | None = None
    """Fail the job when its attempts have run for this long in all."""
    pending_deadline_seconds: Seconds | None = None
    """Fail the job when its pods have waited this long to start."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Delete the FineTuneJob (never the adapter) this long after it ended."""

    @property
    def uris(self) -> dict[str, str]:
        """All that is read and written, by its field below spec."""
        found = {
            "model.source": self.model.source,
            **{f"dataset.{name}": uri for name, uri in self.dataset.uris.items()},
            "lora.initFrom": self.lora.init_from,
            "checkpoint.uri": self.checkpoint.uri,
            "output.uri": self.output.uri,
        }
        for index, each in enumerate(self.publish.only_if if self.publish else ()):
            found[f"publish.onlyIf[{index}].betterThan"] = each.better_than
        return {field: uri for field, uri in found.items() if uri}


#: Sections of the spec that may not change once an attempt exists, the image once one has run (CEL rules in crd.py).
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
    "publish",
    "pack",
    "image",
    "pendingDeadlineSeconds",
)


class Metadata(ApiModel):
    """The part of ObjectMeta that a job's own rules look at; the rest is kept as it is."""

    model_config = {"extra": "allow"}

    name: JobName
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
