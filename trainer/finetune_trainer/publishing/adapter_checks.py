"""Load an adapter with PEFT, as a user would, and compare it with the one that was trained."""

import math
from pathlib import Path
from typing import Any, Final

import structlog
import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights

from finetune_trainer.errors import Diverged
from finetune_trainer.model.adapter import adapter_weights, detach_adapter
from finetune_trainer.model.architecture import layout
from finetune_trainer.model.embeddings import grow
from finetune_trainer.model.experts import attaching_adapters
from finetune_trainer.publishing.artifact import Check, Losses, LossMeter, Trained, VerificationFailed
from finetune_trainer.stores.errors import StoreCorrupted

log = structlog.get_logger(__name__)
#: The same weights on the same base differ by rounding alone.
TOLERANCE: Final = 1e-3


def compare_losses(trained: Trained, meter: LossMeter) -> Check:
    """Return a check that an adapter, loaded with PEFT on its base, has the weights and the loss of the trained model.

    Raises Diverged if that loss is NaN or infinite. Each check takes the model apart and puts the adapter on its base.
    """
    model = trained.model
    expected = meter.loss_of(model)
    if not math.isfinite(expected):
        raise Diverged("The trained adapter's loss is NaN or infinite; it is not published")

    weights = _copied(adapter_weights(model))

    def check(folder: Path, where: str) -> Losses:
        nonlocal model
        base = detach_adapter(model)
        with attaching_adapters(base):
            model = PeftModel.from_pretrained(base, str(folder))
        require_same(adapter_weights(model), weights, where)
        found = meter.loss_of(model)
        if not abs(found - expected) <= TOLERANCE * max(1.0, abs(expected)):
            raise VerificationFailed(
                f"The adapter at {where}, loaded back, has loss {found:.6f} where training ended with"
                f" {expected:.6f}; it is not published"
            )
        log.info(f"The adapter at {where} was loaded back with PEFT and computes the same", loss=round(found, 6))
        return Losses(expected, found)

    return check


def compare_weights(trained: Trained) -> Check:
    """Return a check for sharded models: it compares adapter weights bit for bit.

    No process can compute alone there. The adapter is loaded with PEFT on the base model's layout, without its weights.
    Raises Diverged if a trained weight is NaN or infinite.
    """
    expected = adapter_weights(trained.model)
    if not all(torch.isfinite(weight).all() for weight in expected.values()):
        raise Diverged("The trained adapter has weights that are NaN or infinite; it is not published")

    def check(folder: Path, where: str) -> None:
        skeleton = layout(trained.base.config, trained.spec)
        grow(skeleton, trained.base.new_tokens)
        loaded = PeftModel.from_pretrained(on_meta_like_zeros(skeleton), str(folder), torch_device="cpu")
        require_same(adapter_weights(loaded), expected, where)
        log.info(f"The adapter at {where} was loaded back with PEFT and has the weights that were trained")

    return check


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    """Raise VerificationFailed unless both adapters are the same, bit for bit in the types they are loaded as."""
    same = found.keys() == expected.keys()
    if not same or not all(torch.equal(each, expected[name].to(each.dtype)) for name, each in found.items()):
        raise VerificationFailed(
            f"The adapter at {where}, loaded back, has other weights than were trained; it is not published"
        )


def _copied(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies: on a CPU the weights are the model's own, which a check takes apart."""
    return {name: weight.clone() for name, weight in weights.items()}


def load_alone(folder: Path, where: str) -> None:
    """Load the adapter in `folder` as PEFT does, without a base model.

    Raises:
        StoreCorrupted: It has no weights, or weights that are NaN or infinite.
    """
    PeftConfig.from_pretrained(str(folder))
    weights = load_peft_weights(str(folder), device="cpu")
    if not weights or not all(torch.isfinite(weight).all() for weight in weights.values()):
        raise StoreCorrupted(f"the adapter at {where} has weights that are NaN or infinite, or none at all")
    log.info(f"The adapter at {where} was loaded back with PEFT", tensors=len(weights))


def on_meta_like_zeros(model: Any) -> Any:
    """Replace the meta weights of `model` with zeros on the CPU, one element each: PEFT puts adapters beside weights.

    It costs no memory, however large the model.
    """
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            zeros = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
            module._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
    return model
