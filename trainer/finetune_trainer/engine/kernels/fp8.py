"""The inner part of a gated MLP, silu(gate) * up, and its gradient, rounded to e4m3 in one pass over memory, in Triton.

A scale belongs to a whole row, so that torch.compile's kernels read each row twice: for its largest number, then to
divide. Here a program holds its row in registers. engine.fp8_mlp defines the numbers. This module needs triton; torch's
dispatcher calls it as finetune::round_gated and finetune::round_gated_slopes.
"""

# ruff: noqa: N803 - tensors in memory and what is known at compile time have capitals in Triton

from typing import Any, Final

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import libdevice

#: The widest row that registers hold.
LARGEST_WIDTH: Final = 32768
#: Registers of a thread: few enough that a multiprocessor has a second row on its way while it works on one.
_REGISTERS: Final = 128
#: Those of a multiprocessor, which all warps of a program share, 32 threads each.
_REGISTERS_OF_A_PROGRAM: Final = 65536 // 32


@triton.jit
def _load(ROW, PART: tl.constexpr, OF: tl.constexpr, WIDTH: tl.constexpr):
    """Load the part at PART of a row, OF numbers; what is beyond the row is 0."""
    column = PART * OF + tl.arange(0, OF)
    return tl.load(ROW + column) if (PART + 1) * OF <= WIDTH else tl.load(ROW + column, mask=column < WIDTH, other=0.0)


@triton.jit
def _sigmoid(values):
    return libdevice.fast_dividef(1.0, 1 + libdevice.fast_expf(-values.to(tl.float32)))


@triton.jit
def _silu(values):
    return (values.to(tl.float32) * _sigmoid(values)).to(values.dtype)


@triton.jit
def _store_rounded(parts, ROW, SCALE, OF: tl.constexpr, WIDTH: tl.constexpr):
    """Store a row as engine.fp8.rounded would: the cast, too, stops at the largest number and keeps what is none."""
    largest = tl.abs(parts[0])
    for part in tl.static_range(1, len(parts)):
        largest = tl.maximum(largest, tl.abs(parts[part]))
    largest = tl.max(largest.to(tl.float32), 0)
    scale = tl.where(largest > 0, tl.div_rn(largest, 448.0), 1.0)
    tl.store(SCALE, scale)
    inverse = tl.minimum(tl.div_rn(1.0, scale), 3.4e38)  # a scale may lie below float32's normal numbers
    for part in tl.static_range(len(parts)):
        column = part * OF + tl.arange(0, OF)
        quotient = (parts[part].to(tl.float32) * inverse).to(ROW.dtype.element_ty)
        if (part + 1) * OF <= WIDTH:
            tl.store(ROW + column, quotient)
        else:
            tl.store(ROW + column, quotient, mask=column < WIDTH)


@triton.jit
def _round_gated(GATE, UP, OUT, SCALE, WIDTH: tl.constexpr, OF: tl.constexpr, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    found = ()
    for part in tl.static_range(PARTS):
        gate, up = _load(GATE + row * WIDTH, part, OF, WIDTH), _load(UP + row * WIDTH, part, OF, WIDTH)
        found += (_silu(gate) * up,)  # type: ignore[assignment]
    _store_rounded(found, OUT + row * WIDTH, SCALE + row, OF, WIDTH)


@triton.jit
def _round_gated_slopes(
    SLOPE, GATE, UP, OUT_GATE, SCALE_GATE, OUT_UP, SCALE_UP,
    WIDTH: tl.constexpr, OF: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    of_gate, of_up = (), ()
    for part in tl.static_range(PARTS):
        gate, up = _load(GATE + row * WIDTH, part, OF, WIDTH), _load(UP + row * WIDTH, part, OF, WIDTH)
        slope = _load(SLOPE + row * WIDTH, part, OF, WIDTH)
        of_up += (slope * _silu(gate),)  # type: ignore[assignment]
        sigmoid, wide = _sigmoid(gate), gate.to(tl.float32)
        found = (slope * up).to(tl.float32) * sigmoid * (1 + wide * (1 - sigmoid))
        of_gate += (found.to(gate.dtype),)  # type: ignore[assignment]
    _store_rounded(of_gate, OUT_GATE + row * WIDTH, SCALE_GATE + row, OF, WIDTH)
    _store_rounded(of_up, OUT_UP + row * WIDTH, SCALE_UP + row, OF, WIDTH)


def parts_of(width: int) -> dict[str, Any]:
    """Return how a program takes a row of `width` numbers: in up to 7 parts, 8 numbers of each to a thread."""
    part = max(triton.next_power_of_2(triton.cdiv(width, 7)), 256)
    return {"WIDTH": width, "OF": part, "PARTS": triton.cdiv(width, part), "num_warps": part // 256}


@torch.library.custom_op("finetune::round_gated", mutates_args=())
def round_gated(gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return silu(gate) * up of two tensors [rows, width] in e4m3, and the scale of each row, float32 [rows, 1]."""
    rows, width = gate.shape
    out, scale = _empty(gate)
    _round_gated[(rows,)](gate.contiguous(), up.contiguous(), out, scale, **parts_of(width))
    return out, scale


@torch.library.custom_op("finetune::round_gated_slopes", mutates_args=())
def round_gated_slopes(
    slope: torch.Tensor, gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of gate and of up from that of silu(gate) * up, in e4m3 and each with its scale."""
    rows, width = gate.shape
    found, parts = (*_empty(gate), *_empty(gate)), parts_of(width)
    registers = min(_REGISTERS, _REGISTERS_OF_A_PROGRAM // parts["num_warps"])
    _round_gated_slopes[(rows,)](
        slope.contiguous(), gate.contiguous(), up.contiguous(), *found, **parts, maxnreg=registers
    )
    return found


def _empty(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        like.new_empty(like.shape, dtype=torch.float8_e4m3fn),
        like.new_empty((like.shape[0], 1), dtype=torch.float32),
    )


@round_gated.register_fake
def _(gate, up):
    return _empty(gate)


@round_gated_slopes.register_fake
def _(slope, gate, up):
    return *_empty(gate), *_empty(gate)
