"""Products of frozen experts, in 4 bits or plain, with the tokens that are routed to them, and the adapters on them.

Tokens are sorted by expert, so that each expert multiplies a block of rows (MegaBlocks, arXiv:2211.15841): one grouped
product for all of them. Weights in 4 bits are dequantized for the product, and once more for its gradient: no pass
keeps them. Adapters multiply tokens, as on linear layers; PEFT adds their product to all weights instead.
"""

import functools
from collections.abc import Sequence
from typing import Any, Final

import structlog
import torch
from torch.utils.flop_counter import register_flop_formula
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from finetune_trainer.errors import type_and_reason
from finetune_trainer.model.experts import GROUPED, MATRICES, dequantize, is_experts, quantized

log = structlog.get_logger(__name__)
_ADAPTER: Final = "default"
#: torch's grouped products take bfloat16, on GPUs since Ampere, in rows of whole 16 bytes.
_MIN_COMPUTE_CAPABILITY: Final = (8, 0)
_MULTIPLE: Final = 8
#: What half precision may differ by, as a part of the result's norm.
_TOLERANCE: Final = 1e-2


def multiply_grouped(model: Any) -> None:
    """Let the experts of `model` compute as this module does; log why they are multiplied one by one if they are."""
    experts = [module for module in model.modules() if is_experts(module)]
    if not experts:
        return
    ALL_EXPERTS_FUNCTIONS.register(GROUPED, forward)
    for each in experts:
        each.config._experts_implementation = GROUPED
    problem = next((problem for name in MATRICES if (problem := _one_by_one(experts[0], name))), None)
    if problem:
        log.warning(f"Experts are multiplied one by one, which is slower: {problem}")


def _one_by_one(experts: Any, name: str) -> str | None:
    """Return why the parameter `name` of `experts` is not multiplied in one product on its GPU, None if it is."""
    if packed := quantized(experts, name):
        shape, dtype, device = packed[1].shape, packed[1].dtype, packed[0].device
    elif (weight := experts._parameters.get(name)) is not None:
        shape, dtype, device = weight.shape, weight.dtype, weight.device
    else:
        return None
    return _ungrouped(shape, dtype, device) if device.type == "cuda" else None


def forward(
    self: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    adapters: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Return what the experts make of `hidden_states` [tokens, width]; transformers calls it for each layer.

    Args:
        self: The experts' module.
        hidden_states: The tokens.
        top_k_index: The experts of each token [tokens, k].
        top_k_weights: What each expert's answer is multiplied by [tokens, k].
        adapters: PEFT's wrapper of each parameter that has an adapter.
    """
    tokens, k = top_k_index.shape
    expert, order = top_k_index.reshape(-1).sort(stable=True)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    each = torch.arange(self.num_experts, dtype=expert.dtype, device=expert.device)
    ends = torch.searchsorted(expert, each, right=True, out_int32=True)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    found: torch.Tensor = _Sorted.apply(hidden_states, order, back)  # type: ignore[no-untyped-call]
    found = _product(self, first, found, expert, ends, adapters or {})
    found = self._apply_gate(found) if self.has_gate else self.act_fn(found)
    found = _product(self, "down_proj", found, expert, ends, adapters or {})
    if getattr(self, "has_post_expert_norm", False):
        found = self.post_expert_norm(found)
    found = _Permuted.apply(found, back, order)  # type: ignore[no-untyped-call]
    found = found.view(tokens, k, -1) * top_k_weights.unsqueeze(-1)
    return found.sum(dim=1).to(hidden_states.dtype)


class _Sorted(torch.autograd.Function):
    """Rows repeated for each of their experts, and sorted. torch's own gradient of it sums in no certain order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.rows = len(x)
        return x[order // (len(order) // len(x))]

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return slopes[0][back].view(ctx.rows, -1, slopes[0].shape[-1]).sum(1), None, None


class _Permuted(torch.autograd.Function):
    """Rows in another order; `back` undoes it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (back,) = ctx.saved_tensors
        return slopes[0][back], None, None


def _product(
    experts: Any, name: str, x: torch.Tensor, expert: torch.Tensor, ends: torch.Tensor, adapters: dict[str, Any]
) -> torch.Tensor:
    """Return the rows `x`, sorted by `expert`, times the matrices of the parameter `name`, with bias and adapter."""
    packed = quantized(experts, name)
    if packed is None:
        weight = getattr(experts, name)
        x = x.to(weight.dtype)
        found = grouped(x, weight.transpose(-2, -1) if experts.is_transposed else weight, ends)
    else:
        weight, scales = packed
        x = x.to(scales.dtype)
        how = (ends, experts.is_transposed, scales.method)
        found = grouped_4bit(x, weight, scales.scales, scales.code, scales.shape, *how)
    if wrapper := adapters.get(name):
        a, b = (matrix.to(x.dtype) for matrix in _low_rank(wrapper))
        found = found + grouped(grouped(x, a, ends), b, ends)
    if experts.has_bias:
        found = found + getattr(experts, f"{name}_bias")[expert]
    return found  # type: ignore[no-any-return]


def _low_rank(wrapper: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A [experts, rank, inputs] and the scaled B [experts, outputs, rank] of PEFT's `wrapper`.

    Zeros make the rank a multiple that can be multiplied in groups.
    """
    a, b = wrapper.lora_A[_ADAPTER].weight, wrapper.lora_B[_ADAPTER].weight
    a = a.view(wrapper.num_experts, -1, a.shape[-1])
    b = b.view(b.shape[0], -1, wrapper.num_experts).permute(2, 0, 1).contiguous() * wrapper.scaling[_ADAPTER]
    if more := -a.shape[1] % _MULTIPLE:
        a, b = torch.nn.functional.pad(a, (0, 0, 0, more)), torch.nn.functional.pad(b, (0, more))
    return a, b


def _ungrouped(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why torch does not multiply with weights of `shape` in one grouped product, None if it does."""
    if dtype != torch.bfloat16:
        return f"torch's grouped products are of bfloat16, and these are of {str(dtype).removeprefix('torch.')}"
    if shape[1] % _MULTIPLE or shape[2] % _MULTIPLE:
        return f"their widths {list(shape[1:])} are no multiples of {_MULTIPLE}"
    return self_check(device)


@functools.cache
def self_check(device: torch.device) -> str | None:
    """Compare small grouped products with one product of each block; return what is wrong, None when they agree."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _MIN_COMPUTE_CAPABILITY:
        return "this GPU is older than torch's grouped products"
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((24, 16), (3, 32, 16), (24, 32))
    x, weight, slope = (torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes)
    ends = torch.tensor([10, 10, 24], dtype=torch.int32, device=device)
    try:
        results = [
            [_multiply(x, weight, ends, is_grouped), _outer(slope, x, ends, is_grouped)] for is_grouped in (True, False)
        ]
    except Exception as error:
        return f"torch's grouped products fail here: {type_and_reason(error)}"
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    return None if worst <= _TOLERANCE else f"torch's grouped products differ from single ones by {worst:.1%} here"


def _is_grouped(x: torch.Tensor, shape: Sequence[int]) -> bool:
    return x.is_cuda and _ungrouped(shape, x.dtype, x.device) is None


def _multiply(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, is_grouped: bool) -> torch.Tensor:
    """Return each block of rows of `x` times the transpose of its matrix of `weight` [experts, outputs, inputs]."""
    if is_grouped:
        return torch.nn.functional.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    out = x.new_empty(len(x), weight.shape[1])
    for matrix, begin, end in _blocks(ends):
        torch.mm(x[begin:end], weight[matrix].t(), out=out[begin:end])
    return out


def _outer(
    slope: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, is_grouped: bool, filled: bool = True
) -> torch.Tensor:
    """Return the gradient of a product's `weight`, [experts, outputs, inputs]; see `grouped_outer`."""
    if is_grouped:
        found = torch.nn.functional.grouped_mm(slope.t(), x, offs=ends)
        if not filled:
            return found
        return found.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0.0)  # experts of no rows
    out = x.new_zeros(len(ends), slope.shape[1], x.shape[1])
    for matrix, begin, end in _blocks(ends):
        torch.mm(slope[begin:end].t(), x[begin:end], out=out[matrix])
    return out


def _blocks(ends: torch.Tensor) -> list[tuple[int, int, int]]:
    """Return the experts that have rows, and where those begin and end."""
    last = ends.tolist()
    return [
        (expert, begin, end)
        for expert, (begin, end) in enumerate(zip([0, *last[:-1]], last, strict=True))
        if end > begin
    ]


@torch.library.custom_op("finetune::grouped", mutates_args=())
def grouped(x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor, filled: bool = True) -> torch.Tensor:
    """Return `x` [rows, inputs], whose rows up to ends[e] are expert e's, times weight[e]^T [outputs, inputs].

    `filled`: as of `grouped_outer`, for the gradient of `weight`.
    """
    return _multiply(x, weight, ends, _is_grouped(x, weight.shape))


@torch.library.custom_op("finetune::grouped_outer", mutates_args=())
def grouped_outer(slope: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, filled: bool = True) -> torch.Tensor:
    """Return the gradient of the weights of `grouped`.

    That of a matrix without rows is zero if `filled`, which takes more launches than the product; else it is anything.
    """
    return _outer(slope.contiguous(), x, ends, _is_grouped(x, (len(ends), slope.shape[1], x.shape[1])), filled)


@torch.library.custom_op("finetune::grouped_4bit", mutates_args=())
def grouped_4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    code: torch.Tensor,
    shape: list[int],
    ends: torch.Tensor,
    turned: bool,
    method: str,
) -> torch.Tensor:
    """Return the same for weights in 4 bits, which are dequantized here and do not outlive it.

    `turned`: they are stored as [experts, inputs, outputs]. `method`: see model.experts.dequantize.
    """
    weight = dequantize(packed, scales, code, shape, x.dtype, method)
    weight = weight.transpose(-2, -1) if turned else weight
    return _multiply(x, weight, ends, _is_grouped(x, weight.shape))


@grouped.register_fake
def _(x, weight, ends, filled=True):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(slope, x, ends, filled=True):  # type: ignore[no-untyped-def]
    return x.new_empty(ends.shape[0], slope.shape[1], x.shape[1])


@grouped_4bit.register_fake
def _(x, packed, scales, code, shape, ends, turned, method):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], shape[2 if turned else 1])


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ends, ctx.filled = inputs
    ctx.trains = weight.requires_grad  # frozen weights need no input kept
    ctx.save_for_backward(weight, ends, *([x] if ctx.trains else []))


def _backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weight, ends, *x = ctx.saved_tensors
    slope = slope.contiguous()
    of_weight = grouped_outer(slope, x[0], ends, ctx.filled) if ctx.trains else None
    return grouped(slope, weight.transpose(-2, -1), ends), of_weight, None, None


def _keep_4bit(ctx: Any, inputs: Any, output: Any) -> None:
    _, packed, scales, code, ctx.shape, ends, ctx.turned, ctx.method = inputs
    ctx.save_for_backward(packed, code, ends, *scales)


def _backward_4bit(ctx: Any, slope: torch.Tensor) -> tuple[Any, ...]:
    packed, code, ends, *scales = ctx.saved_tensors
    of_x = grouped_4bit(slope.contiguous(), packed, scales, code, ctx.shape, ends, not ctx.turned, ctx.method)
    return of_x, None, [None] * len(scales), None, None, None, None, None


grouped.register_autograd(_backward, setup_context=_keep)
grouped_4bit.register_autograd(_backward_4bit, setup_context=_keep_4bit)


@register_flop_formula([torch.ops.finetune.grouped, torch.ops.finetune.grouped_outer])
def _flops(x: Sequence[int], other: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * other[1]


@register_flop_formula(torch.ops.finetune.grouped_4bit)
def _flops_4bit(x: Sequence[int], packed: Any, scales: Any, code: Any, shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * shape[1] * shape[2]
