"""Norms and adapters in fewer kernels, while a GPU evaluates: a decoded token is thousands of small ones otherwise."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.functional import linear

from finetune_trainer.errors import type_and_reason

log = structlog.get_logger(__name__)
_ADAPTER: Final = "default"
#: What two roundings of one number in half precision may differ by.
_ROUNDING: Final = 2**-7


def kernels(device: torch.device) -> Any | None:
    """Return the module of Triton kernels, None where there are none."""
    if device.type != "cuda":
        return None
    try:
        return importlib.import_module("finetune_trainer.evaluation.decode_kernels")
    except Exception as error:
        log.warning(f"Answers are generated without Triton kernels, which is slower: {type_and_reason(error)}")
        return None


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Compute the adapters and norms of `model` in fewer kernels in this block, where there are Triton kernels.

    An adapter is rounded once, when it is added, and its weights are cast once for all tokens. Norms are compared with
    their own code first.
    """
    triton, kinds = kernels(model.device), dict[type, bool]()
    if triton is None:
        yield
        return
    before: list[tuple[Any, Any]] = []
    try:
        for module in model.modules():
            if _is_plain_adapter(module):
                forward = _adapter_forward(module, model.device.type)
            elif _is_norm(module, kinds, triton.rms_norm):
                forward = _norm_forward(module, triton.rms_norm)
            else:
                continue
            before.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.__dict__["forward"]
            else:
                module.forward = forward


def _is_plain_adapter(module: Any) -> bool:
    return (
        isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and not module.disable_adapters
        and not module.merged
        and module.active_adapters == [_ADAPTER]
        and _ADAPTER not in module.lora_variant
        and isinstance(dict(module.lora_A).get(_ADAPTER), torch.nn.Linear)
        and module.lora_B[_ADAPTER].bias is None
    )


def _adapter_forward(module: Any, device: str) -> Callable[..., torch.Tensor]:
    a, b = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
    a, b, scaling, plain = a.to(dtype), b.to(dtype).t(), module.scaling[_ADAPTER], module.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = module.base_layer(x, *args, **kwargs)
        if base.dtype != dtype or kwargs:
            return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        found = torch.addmm(base.flatten(0, -2), linear(x.to(dtype), a).flatten(0, -2), b, alpha=scaling)
        return found.view_as(base)

    return forward


def _is_norm(module: Any, kinds: dict[type, bool], fast: Callable[..., torch.Tensor]) -> bool:
    """Return whether `module` is a norm that `fast` computes; each class is tried once."""
    kind = type(module)
    if not kind.__name__.endswith("RMSNorm"):
        return False
    if kind not in kinds:
        kinds[kind] = _computes_alike(module, fast)
    return kinds[kind]


def _computes_alike(module: Any, fast: Callable[..., torch.Tensor]) -> bool:
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if weight is None or weight.dim() != 1 or epsilon is None:
        return False
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(16, len(weight), generator=generator, device=weight.device).to(weight.dtype)
    try:
        found, expected = fast(x, weight, epsilon), module(x)
    except Exception as error:
        log.warning(f"Norms are computed in several kernels: {type_and_reason(error)}")
        return False
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=_ROUNDING, atol=0)


def _norm_forward(module: Any, fast: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, epsilon = module.weight, module.variance_epsilon
    return lambda x: fast(x, weight, epsilon)
