"""The last check: load what was published, as a user would, and see that it computes what was trained."""

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights

from finetune_api.artifact_manifest import StoreManifest
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import Diverged
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.model.base import BaseModel, layout
from finetune_trainer.publishing.publish import REQUIRED, AdapterOutput
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.errors import StoreCorrupted

log = structlog.get_logger(__name__)
#: The same weights on the same base differ by rounding alone.
TOLERANCE = 1e-3


class VerificationFailed(Exception):
    """An adapter on its way to publication does not compute what was trained."""


def make_verifier(
    model: Any, base: BaseModel, evaluator: Evaluator, plan: ExecutionPlan, spec: FineTuneJobSpec, scratch: Path
) -> "Verifier":
    """Choose how to verify the adapter, and note what the trained `model` computes.

    Args:
        model: The trained PEFT model, with the weights that are published; the first check takes it apart.
        base: The base model's configuration.
        evaluator: Measures the loss on some rows, on this process alone.
        plan: With sharded or fp8 weights this process cannot compute what a user's will: weights are compared.
        spec: The job's spec.
        scratch: A folder to download to.

    Raises:
        Diverged: The adapter computes, or holds, NaN or infinite numbers.
    """
    if plan.sharded or plan.fp8:
        return ShardedVerifier(model, scratch, lambda: layout(base.config, spec))
    return LossVerifier(model, scratch, evaluator)


class Verifier(ABC):
    """Loads an adapter back with PEFT and compares it with the one that was trained."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def check_local(self, folder: Path) -> None:
        """Check the adapter in `folder`, before it is uploaded. Raises VerificationFailed."""
        self._check(folder, "hand")

    def check_uploaded(self, output: AdapterOutput, digests: Mapping[str, Digest]) -> None:
        """Download the adapter's files from `output` and check them. Raises VerificationFailed, StoreError."""
        _fetch(output.store, {name: digests[name].sha256 for name in REQUIRED}, self._scratch)
        self._check(self._scratch, str(output.store.root))

    @abstractmethod
    def _check(self, folder: Path, where: str) -> None:
        """Check the adapter in `folder`; `where` names it in messages."""


class LossVerifier(Verifier):
    """Compares the loss of the trained model with that of the adapter, loaded with PEFT on the same base."""

    def __init__(self, model: Any, scratch: Path, evaluator: Evaluator) -> None:
        super().__init__(scratch)
        self._model = model
        self._evaluator = evaluator
        self._expected = evaluator.loss_of(model)
        if not math.isfinite(self._expected):
            raise Diverged("The trained adapter's loss is NaN or infinite; it is not published")

    def _check(self, folder: Path, where: str) -> None:
        self._model = PeftModel.from_pretrained(self._model.unload(), str(folder))
        found = self._evaluator.loss_of(self._model)
        if not abs(found - self._expected) <= TOLERANCE * max(1.0, abs(self._expected)):
            raise VerificationFailed(
                f"The adapter at {where}, loaded back, has loss {found:.6f} where training ended with"
                f" {self._expected:.6f}; it is not published"
            )
        log.info(f"The adapter at {where} was loaded back with PEFT and computes the same", loss=round(found, 6))


class ShardedVerifier(Verifier):
    """Verifier for sharded models: compares adapter weights bit for bit.

    No process can compute alone there: the adapter is loaded with PEFT on the base model's layout, without its weights.
    """

    def __init__(self, model: Any, scratch: Path, make_layout: Callable[[], Any]) -> None:
        """`make_layout` makes the base model on torch's meta device."""
        super().__init__(scratch)
        self._trained = _adapter_weights(model)
        self._make_layout = make_layout
        if not all(torch.isfinite(weight).all() for weight in self._trained.values()):
            raise Diverged("The trained adapter has weights that are NaN or infinite; it is not published")

    def _check(self, folder: Path, where: str) -> None:
        base = on_meta_like_zeros(self._make_layout())
        found = _adapter_weights(PeftModel.from_pretrained(base, str(folder), torch_device="cpu"))
        same = found.keys() == self._trained.keys()
        if not same or not all(torch.equal(weight, self._trained[name]) for name, weight in found.items()):
            raise VerificationFailed(
                f"The adapter at {where}, loaded back, has other weights than were trained; it is not published"
            )
        log.info(f"The adapter at {where} was loaded back with PEFT and has the weights that were trained")


def load_back(output: AdapterOutput, folder: Path) -> StoreManifest:
    """Download an adapter that an earlier attempt published to `folder`, and load it as PEFT does, without a base.

    It was loaded on its base before its manifest was written (finetune_trainer.publishing.publish). Its bytes are
    compared with that manifest here: they are the bytes that passed.

    Returns:
        Its manifest.

    Raises:
        StoreCorrupted: The adapter is gone, or has no weights, or weights that are NaN or infinite.
    """
    store = output.store
    found = store_manifest.read(store)
    if found is None:
        raise StoreCorrupted(f"{store.field}: {store.root} holds no adapter any more")
    manifest, _ = found
    _fetch(store, {file.path: file.sha256 for file in manifest.files if file.path in REQUIRED}, folder)
    PeftConfig.from_pretrained(str(folder))
    weights = load_peft_weights(str(folder), device="cpu")
    if not weights or not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise StoreCorrupted(f"{store.field}: the adapter at {store.root} has weights that are NaN, or none at all")
    log.info(f"The adapter at {store.root} was loaded back with PEFT", tensors=len(weights))
    return manifest


def on_meta_like_zeros(model: Any) -> Any:
    """Replace the meta weights of `model` with zeros on the CPU, one element each: PEFT puts adapters beside weights.

    It costs no memory, however large the model.
    """
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
    return model


def _adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def _fetch(store: Store, digests: Mapping[str, str], folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, sha256 in digests.items():
        store.download(name, folder / name, sha256=sha256)
