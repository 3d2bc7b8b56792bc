"""Keep 4-bit weights dequantized where memory allows, else dequantize in one pass over memory: the same numbers."""

import importlib
from collections.abc import Sequence
from typing import Any

import structlog
import torch

from finetune_trainer.engine.fsdp import gather
from finetune_trainer.engine.lora import while_training
from finetune_trainer.engine.modules import replace_modules
from finetune_trainer.errors import type_and_reason
from finetune_trainer.model.experts import (
    KERNEL,
    MATRICES,
    SCALES_OF_A_BLOCK,
    Quantized,
    dequantize,
    is_experts,
    quantized,
)
from finetune_trainer.runtime.patches import swap_forward

log = structlog.get_logger(__name__)


def keep_dequantized(layers: list[Any]) -> None:
    """Replace each 4-bit linear layer in `layers` with a plain one that has the same numbers."""
    from bitsandbytes.nn import Linear4bit

    replace_modules(layers, lambda module: isinstance(module, Linear4bit), dequantized)


def dequantized(linear: Any) -> torch.nn.Linear:
    """Return a frozen plain linear layer that computes the same as the 4-bit `linear`, in its compute type."""
    from bitsandbytes.functional import dequantize_4bit

    dtype = linear.compute_dtype or linear.weight.quant_state.dtype
    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)
    plain = _Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        plain.bias = torch.nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return plain.train(linear.training)


def dequantize_in_one_pass(modules: Sequence[Any]) -> None:
    """Use the Triton dequantize kernel in `modules` if it matches bitsandbytes bit for bit; else log why not.

    In training only, and for layers to be compiled: the host takes longer to start it than bitsandbytes' product, which
    decides where layers run eager. Each of the modules is sharded on its own, if any is; then every rank must do this.
    """
    found = [(module, each) for module in modules for each in module.modules() if _is_supported(each)]
    if not found or found[0][1].weight.device.type != "cuda":
        return
    linears = [linear for _, linear in found]
    _correct_codes(linears)
    gather(found[0][0])
    try:
        problem = _try_kernel_on(linears[0])
    except Exception as error:
        problem = type_and_reason(error)
    if problem:
        log.warning(f"Triton dequantize kernel disabled, using bitsandbytes: {problem}")
        return
    for linear in linears:
        multiply_by_kernel(linear)


def _correct_codes(linears: Sequence[Any]) -> None:
    """Set what the 16 indices stand for to what bitsandbytes' kernels know: they do not read a checkpoint's table."""
    from bitsandbytes.functional import get_4bit_type

    codes: dict[str, torch.Tensor] = {}
    for linear in linears:
        state = linear.weight.quant_state
        if state.quant_type not in codes:
            codes[state.quant_type] = get_4bit_type(state.quant_type, device=linear.weight.device).float()
        state.code = codes[state.quant_type]


def dequantize_experts_in_one_pass(model: Any) -> None:
    """Use the Triton dequantize kernel for experts of `model` if it matches bitsandbytes bit for bit; else log why."""
    both = ((module, name) for module in model.modules() if is_experts(module) for name in MATRICES)
    found = [each for module, name in both if (each := quantized(module, name))]
    if not found or found[0][0].device.type != "cuda":
        return
    try:
        importlib.import_module("finetune_trainer.engine.kernels.dequantize")
        problem = _try_kernel_on_experts(*found[0])
    except Exception as error:
        problem = type_and_reason(error)
    if problem:
        log.warning(f"Triton dequantize kernel disabled for experts, using bitsandbytes: {problem}")
        return
    for _, scales in found:
        scales.method = KERNEL


def _try_kernel_on_experts(packed: torch.Tensor, scales: Quantized) -> str | None:
    arguments = (packed, scales.scales, scales.code, scales.shape, scales.dtype)
    same = torch.equal(dequantize(*arguments, KERNEL), dequantize(*arguments, scales.method))
    return None if same else "it computes other weights than bitsandbytes on this GPU"


def multiply_by_kernel(linear: Any) -> None:
    """Let a 4-bit `linear` layer multiply with weights that the Triton kernel dequantizes, while it trains."""
    product = importlib.import_module("finetune_trainer.engine.kernels.dequantize").product

    def forward(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = product(x.to(linear.compute_dtype), *_packed(linear))
        return found.to(x.dtype)

    swap_forward(linear, while_training(forward, linear.forward))


def _try_kernel_on(linear: Any) -> str | None:
    from bitsandbytes.functional import dequantize_4bit

    dequantize = importlib.import_module("finetune_trainer.engine.kernels.dequantize").dequantize
    found = dequantize(*_packed(linear), linear.compute_dtype)
    expected = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    return None if torch.equal(found, expected) else "it computes other weights than bitsandbytes on this GPU"


def _is_supported(module: Any) -> bool:
    """Return whether `module` is a 4-bit layer without bias, of whole blocks, that computes in its weights' type."""
    from bitsandbytes.nn import Linear4bit

    if not isinstance(module, Linear4bit) or module.bias is not None:
        return False
    state = module.weight.quant_state
    whole = state.shape.numel() % state.blocksize == 0 and state.absmax.is_contiguous()
    known = not state.nested or state.state2.blocksize == SCALES_OF_A_BLOCK
    return whole and known and module.compute_dtype == state.dtype and state.dtype in (torch.bfloat16, torch.float16)


def _packed(linear: Any) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, list[int]]:
    """Return the weights of a 4-bit `linear` layer as kernels.dequantize takes them."""
    state = linear.weight.quant_state
    return linear.weight.data, _scales(state), state.code, list(state.shape)


def _scales(state: Any) -> list[torch.Tensor]:
    return [state.absmax, state.state2.code, state.state2.absmax, state.offset] if state.nested else [state.absmax]


class _Linear(torch.nn.Linear):
    """Computes in its weight's type and returns its input's, as a 4-bit layer of bitsandbytes does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
