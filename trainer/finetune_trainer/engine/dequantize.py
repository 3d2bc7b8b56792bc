"""4-bit weights kept dequantized where memory allows, else dequantized in one pass over memory: the same numbers."""

import importlib
from typing import Any

import structlog
import torch

from finetune_trainer.engine.lora import while_training
from finetune_trainer.engine.modules import replace_modules
from finetune_trainer.errors import type_and_reason

log = structlog.get_logger(__name__)


def keep_dequantized(layers: list[Any]) -> None:
    """Put a plain linear layer with the same numbers in the place of each 4-bit one of `layers`."""
    from bitsandbytes.nn import Linear4bit

    replace_modules(layers, lambda module: isinstance(module, Linear4bit), dequantized)


def dequantized(linear: Any) -> torch.nn.Linear:
    """A frozen linear layer that computes what the 4-bit `linear` does, in its compute type."""
    from bitsandbytes.functional import dequantize_4bit

    dtype = linear.compute_dtype or linear.weight.quant_state.dtype
    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)
    plain = _Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        plain.bias = torch.nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return plain.train(linear.training)


def dequantize_in_one_pass(model: Any) -> None:
    """Let the 4-bit linear layers of `model`, on a GPU, dequantize by our own kernel while they train. Where it fails,
    or finds other numbers than bitsandbytes for the first of them, all stay as they are, and the log says why.

    For layers to be compiled: to start it takes the host longer than bitsandbytes' product, which else decides.
    """
    found = [module for module in model.modules() if _is_supported(module)]
    if not found or found[0].weight.device.type != "cuda":
        return
    try:
        problem = _try_kernel_on(found[0])
    except Exception as error:
        problem = f"fails here: {type_and_reason(error)}"
    if problem:
        log.warning(f"The kernel that dequantizes 4-bit weights cannot be used, bitsandbytes' are: it {problem}")
        return
    for linear in found:
        multiply_by_kernel(linear)


def multiply_by_kernel(linear: Any) -> None:
    """Let a 4-bit `linear` layer multiply with weights that our own kernel dequantizes, while it trains."""
    product = importlib.import_module("finetune_trainer.engine.kernels.dequantize").product

    def forward(x: torch.Tensor) -> torch.Tensor:
        return product(x.to(linear.compute_dtype), *_packed(linear)).to(x.dtype)  # type: ignore[no-any-return]

    linear.forward = while_training(forward, linear.forward)


def _try_kernel_on(linear: Any) -> str | None:
    from bitsandbytes.functional import dequantize_4bit

    dequantize = importlib.import_module("finetune_trainer.engine.kernels.dequantize").dequantize
    found = dequantize(*_packed(linear), linear.compute_dtype)
    expected = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return None if torch.equal(found, expected) else "finds other numbers on this GPU"


def _is_supported(module: Any) -> bool:
    """Whether it is a 4-bit layer that computes in the type of its weights: whole blocks of them, and no bias."""
    from bitsandbytes.nn import Linear4bit

    if not isinstance(module, Linear4bit) or module.bias is not None or module.weight.dtype != torch.uint8:
        return False
    state = module.weight.quant_state
    whole = state.shape.numel() % state.blocksize == 0 and state.absmax.is_contiguous()
    return whole and module.compute_dtype == state.dtype and state.dtype in (torch.bfloat16, torch.float16)


def _packed(linear: Any) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, list[int]]:
    """The weights of a 4-bit `linear` layer as triton_4bit takes them."""
    state = linear.weight.quant_state
    return linear.weight.data, _scales(state), state.code, list(state.shape)


def _scales(state: Any) -> list[torch.Tensor]:
    return [state.absmax, state.state2.code, state.state2.absmax, state.offset] if state.nested else [state.absmax]


class _Linear(torch.nn.Linear):
    """Computes in its weight's type and answers in its input's, as a 4-bit layer of bitsandbytes does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
