"""The seam for what a job publishes: how an artifact is built, what it needs to be whole, and how it is checked."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from finetune_api.artifact_manifest import ArtifactKind
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.model.base import BaseModel


@dataclass(frozen=True)
class Losses:
    """What the trained model computes on some rows, and what the artifact does, in nats per token."""

    trained: float
    artifact: float


#: Loads the artifact in a folder and compares it with the trained model; the text says where the artifact is. Returns
#: the losses, None where it compared weights. Raises VerificationFailed.
Check = Callable[[Path, str], Losses | None]


class VerificationFailed(Exception):
    """An artifact on its way to publication does not compute what was trained."""


class LossMeter(Protocol):
    """Measures a model; the Evaluator, for one."""

    def loss_of(self, model: Any) -> float:
        """Return the mean loss of some rows, in nats per token, of a model prepared for training."""
        ...

    def own_loss_of(self, model: Any) -> float:
        """Return the mean loss of the same rows by the model's own logits."""
        ...


@dataclass(frozen=True)
class Trained:
    """What training made.

    Attributes:
        spec: The job's spec.
        model: The PEFT model, with the weights to publish.
        base: The base model's name, configuration and tokenizer.
        plan: How the run was laid out; with sharded or fp8 weights one process cannot compute what a user's will.
        weights: The base model's folder, weights included; for artifacts that hold them.
        adapter: The folder of the adapter as it is published; for artifacts that are made of it.
    """

    spec: FineTuneJobSpec
    model: Any
    base: BaseModel
    plan: ExecutionPlan
    weights: Path | None = None
    adapter: Path | None = None


class Artifact(ABC):
    """One kind of artifact. To add one, see docs/extending/artifact.md.

    Attributes:
        kind: `kind` of manifest.json.
        required_files: The files that a user's program loads. Without them nothing is published; they are downloaded
            again to be checked.
    """

    kind: ClassVar[ArtifactKind]
    required_files: ClassVar[tuple[str, ...]]

    def check_makeable(self, weights: Path, base: BaseModel, spec: FineTuneJobSpec) -> None:  # noqa: B027
        """Raise ConfigInvalid, with the reason, if it cannot be made of this base model; before anything is trained."""

    @abstractmethod
    def build(self, trained: Trained, folder: Path) -> None:
        """Write the artifact's own files to `folder`; tokenizer, model card and provenance are written for it."""

    @abstractmethod
    def make_check(self, trained: Trained, meter: LossMeter) -> Check:
        """Note what the trained model computes, and return the function that compares an artifact with it.

        The check may take `trained.model` apart. Raises Diverged if the model computes NaN or infinity.
        """

    @abstractmethod
    def load(self, folder: Path, where: str) -> None:
        """Load the artifact in `folder`, which an earlier attempt published `where`, without its base model.

        Raises StoreCorrupted if it cannot be of use.
        """
