"""The last check: load what was published, as a user would, and see that it computes what was trained."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import structlog
import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import load_peft_weights

from finetune_api import constants
from finetune_api.artifact_manifest import StoreManifest
from finetune_trainer.errors import Diverged
from finetune_trainer.evaluation.evaluator import Evaluator
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.errors import StoreCorrupted

log = structlog.get_logger(__name__)
#: The same weights on the same base differ by rounding alone.
TOLERANCE = 1e-3
_FILES = (constants.ADAPTER_CONFIG_FILE, constants.ADAPTER_WEIGHTS_FILE)


class VerificationFailed(Exception):
    """An adapter on its way to publication does not compute what was trained."""


class Verifier:
    """Knows what the trained model computes, and whether an adapter, loaded with PEFT on its base, does the same."""

    def __init__(self, model: Any, evaluator: Evaluator) -> None:
        """`model`, with its adapter, is taken apart by the first check. Raises Diverged when its loss is no number."""
        self._model = model
        self._evaluator = evaluator
        self._expected = evaluator.loss_of(model)
        if not math.isfinite(self._expected):
            raise Diverged("The trained adapter's loss is NaN or infinite; it is not published")

    def check(self, folder: Path, where: str) -> None:
        """Load the adapter in `folder`. `where` names it in messages. Raises VerificationFailed."""
        self._model = PeftModel.from_pretrained(self._model.unload(), str(folder))
        found = self._evaluator.loss_of(self._model)
        if not abs(found - self._expected) <= TOLERANCE * max(1.0, abs(self._expected)):
            raise VerificationFailed(
                f"The adapter at {where}, loaded back, has loss {found:.6f} where training ended with"
                f" {self._expected:.6f}; it is not published"
            )
        log.info(f"The adapter at {where} was loaded back with PEFT and computes the same", loss=round(found, 6))

    def check_sent(self, store: Store, digests: Mapping[str, Digest], folder: Path) -> None:
        """The same for the adapter's files at the store's root, fetched to `folder`."""
        _fetch(store, {name: digests[name].sha256 for name in _FILES}, folder)
        self.check(folder, str(store.root))


class ShardedVerifier(Verifier):
    """The same where no process can compute alone, for the base's weights are dealt out: an adapter, loaded with PEFT
    on the base model's layout, must have the weights that were trained, bit for bit."""

    def __init__(self, model: Any, layout: Callable[[], Any]) -> None:
        """`layout` makes the base model on torch's meta device. Raises Diverged when a weight is no number."""
        self._trained = _adapter_weights(model)
        self._layout = layout
        if not all(torch.isfinite(weight).all() for weight in self._trained.values()):
            raise Diverged("The trained adapter has weights that are NaN or infinite; it is not published")

    def check(self, folder: Path, where: str) -> None:
        loaded = PeftModel.from_pretrained(_hollow(self._layout()), str(folder), torch_device="cpu")
        found = _adapter_weights(loaded)
        same = found.keys() == self._trained.keys()
        if not same or not all(torch.equal(weight, self._trained[name]) for name, weight in found.items()):
            raise VerificationFailed(
                f"The adapter at {where}, loaded back, has other weights than were trained; it is not published"
            )
        log.info(f"The adapter at {where} was loaded back with PEFT and has the weights that were trained")


def load_back(store: Store, folder: Path) -> StoreManifest:
    """Fetch a published adapter to `folder` and load it as PEFT does, without a base model; returns its manifest.

    It was loaded on its base before its manifest was written (finetune_trainer.publishing.publish). Its bytes are
    compared with that manifest here: they are the bytes that passed. Raises StoreCorrupted.
    """
    found = store_manifest.read(store)
    if found is None:
        raise StoreCorrupted(f"{store.field}: {store.root} holds no adapter any more")
    manifest, _ = found
    _fetch(store, {file.path: file.sha256 for file in manifest.files if file.path in _FILES}, folder)
    PeftConfig.from_pretrained(str(folder))
    weights = load_peft_weights(str(folder), device="cpu")
    if not weights or not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise StoreCorrupted(f"{store.field}: the adapter at {store.root} has weights that are NaN, or none at all")
    log.info(f"The adapter at {store.root} was loaded back with PEFT", tensors=len(weights))
    return manifest


def _hollow(model: Any) -> Any:
    """`model`, its weights zeros in host memory that share one place each: PEFT puts adapters where weights are."""
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
