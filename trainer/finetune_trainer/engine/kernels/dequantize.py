"""Products with 4-bit weights (QLoRA, arXiv:2305.14314), dequantized in one pass over memory, in Triton.

bitsandbytes dequantizes the scales of double quantization by two kernels of their own, and then the weights. The
numbers here are the same, bit for bit. This module needs triton; torch's dispatcher calls it as
finetune::dequantize_4bit.
"""

# ruff: noqa: N803 - tensors in memory and what is known at compile time have capitals in Triton

from collections.abc import Sequence
from typing import Any, Final

import torch
import triton
import triton.language as tl

from finetune_trainer.model.experts import SCALES_OF_A_BLOCK

#: Blocks of weights of one program.
_TILE = {"BLOCKS": 32, "num_warps": 2}


@triton.jit
def _dequantize(
    PACKED, SCALES, SCALE_CODE, SCALE_SCALES, OFFSET, CODE, OUT, blocks, blocks_of_matrix,
    BYTES: tl.constexpr, TWICE: tl.constexpr, SCALES_OF_A_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks
    scale = tl.load(SCALES + block, mask=inside, other=0)
    if TWICE:
        matrix = block // blocks_of_matrix
        each = matrix * tl.cdiv(blocks_of_matrix, SCALES_OF_A_BLOCK) + block % blocks_of_matrix // SCALES_OF_A_BLOCK
        scale = tl.load(SCALE_CODE + scale.to(tl.int32))
        scale = scale * tl.load(SCALE_SCALES + each, mask=inside, other=0)
        scale = scale + tl.load(OFFSET + matrix, mask=inside, other=0)
    byte = block[:, None].to(tl.int64) * BYTES + tl.arange(0, BYTES)
    packed = tl.load(PACKED + byte, mask=inside[:, None], other=0).to(tl.int32)
    both = tl.interleave(tl.load(CODE + (packed >> 4)), tl.load(CODE + (packed & 15))) * scale[:, None]
    index = block[:, None].to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    tl.store(OUT + index, both.to(OUT.dtype.element_ty), mask=inside[:, None])


def dequantize(
    packed: torch.Tensor, scales: Sequence[torch.Tensor], code: torch.Tensor, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    """Return the weights of `shape` in `dtype`; each byte of `packed`, of any type, holds two indices into `code` [16].

    `scales`: one for each block of weights, float32; or, quantized once more, uint8 indices, the values they stand for
    [256], a scale for each 256 of them, and the number to add to all (a scalar). Of experts [experts, rows, columns]
    each matrix has its own, one after the other.
    """
    packed = packed.view(torch.uint8)  # checkpoints may store them as another type
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    blocks = scales[0].numel()
    twice = len(scales) > 1
    _dequantize[(triton.cdiv(blocks, _TILE["BLOCKS"]),)](
        packed, *(scales if twice else (*scales,) * 4), code, out, blocks,
        blocks // (shape[0] if len(shape) == 3 else 1),
        BYTES=out.numel() // blocks // 2, TWICE=twice, SCALES_OF_A_BLOCK=SCALES_OF_A_BLOCK,
        enable_fp_fusion=False,  # a fused multiplication and addition rounds once, bitsandbytes twice
        **_TILE,
    )  # fmt: skip
    return out


# Defined without torch.library.custom_op: a layer calls them fourteen times a step, and its checks take the host longer
# than all else of a call but the kernel's launch (25 us with them, 11 without).
_LIBRARY: Final = torch.library.Library("finetune", "FRAGMENT")
_ARGUMENTS: Final = "Tensor packed, Tensor[] scales, Tensor code, SymInt[] shape, ScalarType dtype"
_LIBRARY.define(f"dequantize_4bit({_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"dequantize_4bit_after(Tensor gradient, {_ARGUMENTS}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.impl("dequantize_4bit", dequantize, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize_4bit_after", lambda _, *inputs: dequantize(*inputs), "CompositeExplicitAutograd")


@torch.library.register_fake("finetune::dequantize_4bit", lib=_LIBRARY)
def _(packed, scales, code, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("finetune::dequantize_4bit_after", lib=_LIBRARY)
def _(gradient, packed, scales, code, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


class _Product(torch.autograd.Function):
    """The compiler sees a plain product, and weights that each pass makes for itself.

    Those of the backward pass are made by another operation, of the gradient: one that does not need it would be taken
    for the forward pass's own, whose weights would then be kept until the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, packed: torch.Tensor, code: torch.Tensor, shape: list[int], *scales: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(packed, code, *scales)
        ctx.shape = shape
        weights = torch.ops.finetune.dequantize_4bit(packed, scales, code, shape, x.dtype)
        return torch.nn.functional.linear(x, weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        packed, code, *scales = ctx.saved_tensors
        weights = torch.ops.finetune.dequantize_4bit_after(gradient, packed, scales, code, ctx.shape, gradient.dtype)
        return gradient @ weights, None, None, None, *[None] * len(scales)


def product(
    x: torch.Tensor, packed: torch.Tensor, scales: Sequence[torch.Tensor], code: torch.Tensor, shape: list[int]
) -> torch.Tensor:
    """Return x W^T [..., outputs] of `x` [..., inputs] and the weights W that `dequantize` makes, in the type of `x`.

    W does not outlive it: the backward pass dequantizes again.
    """
    found: torch.Tensor = _Product.apply(x, packed, code, shape, *scales)
    return found
