"""The gated MLP of a decoder layer in FP8 as one function: what lies between its products is one pass over memory.

As modules it is gate, up, silu, a product of numbers and down, each rounding its input on its own. Here the input is
rounded once for gate and up, and Triton kernels compute and round the rest (kernels.fp8), forward and backward.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
import torch

from finetune_trainer.engine.attention import HOPPER
from finetune_trainer.engine.fp8 import Fp8Linear, product, rounded
from finetune_trainer.errors import type_and_reason
from finetune_trainer.runtime.patches import swap_forward

log = structlog.get_logger(__name__)
_KERNELS: Final = "finetune_trainer.engine.kernels.fp8"
_NAMES: Final = ("gate_proj", "up_proj", "down_proj")
#: How large gates are in the proof, a row of each: from where silu is half its input to where it is its input, or 0.
_SIZES: Final = torch.logspace(-3, 5, 32, base=2)
#: What the last bit of a row's largest number may change: its scale, and with it how a part of the row is rounded.
_TOLERANCE: Final = 5e-2

Rounded = tuple[torch.Tensor, torch.Tensor]


def fuse(layers: Sequence[Any]) -> None:
    """Let each gated MLP of Fp8Linear layers in `layers` compute as one function, where that is proven; else log why.

    On Hopper, where it was measured to be faster.
    """
    found = [module for layer in layers for module in layer.modules() if _is_supported(module)]
    if not found or not _is_hopper(found[0].gate_proj.weight.device):
        return
    problems = {problem for mlp in found if (problem := fuse_one(mlp))}
    if problems:
        log.warning(f"The fused MLP in FP8 is disabled, using torch.compile's: {'; '.join(sorted(problems))}")


def fuse_one(mlp: Any) -> str | None:
    """Let `mlp` compute as one function if its output and gradient are those of its own; return what is wrong."""
    fused = _forward(mlp, mlp.forward)
    try:
        problem = _difference(mlp, fused)
    except Exception as error:
        problem = f"fails here: {type_and_reason(error)}"
    if problem is None:
        swap_forward(mlp, fused)
    return problem


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


def _is_supported(module: Any) -> bool:
    """Return whether `module` may be a gated MLP; what it computes is left to the proof."""
    linears: list[Any] = [getattr(module, name, None) for name in _NAMES]
    gate, up, down = linears
    if any(type(each) is not Fp8Linear or each.bias is not None for each in linears) or "forward" in vars(module):
        return False
    shapes = [(each.in_features, each.out_features) for each in (gate, up)]
    return shapes == [(down.out_features, down.in_features)] * 2


def _forward(mlp: Any, plain: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if x.dtype != mlp.gate_proj.compute_dtype:  # the types between its products are its own matter, then
            return plain(x)
        matrices = [each for name in _NAMES for each in getattr(mlp, name).matrices]
        found: torch.Tensor = _GatedMlp.apply(x.reshape(-1, x.shape[-1]), *matrices)  # type: ignore[no-untyped-call]
        return found.view(x.shape)

    return forward


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        gate_weight, gate_scale, _, _, up_weight, up_scale, _, _, down_weight, down_scale, _, _ = matrices
        narrow = rounded(x)
        gate = product(*narrow, gate_weight, gate_scale, x.dtype)
        up = product(*narrow, up_weight, up_scale, x.dtype)
        ctx.save_for_backward(gate, up, *(each for at in (2, 6, 10) for each in matrices[at : at + 2]))
        return product(*gated(gate, up), down_weight, down_scale, x.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (slope,) = slopes
        gate, up, gate_turned, gate_scale, up_turned, up_scale, down_turned, down_scale = ctx.saved_tensors
        inner = product(*rounded(slope), down_turned, down_scale, slope.dtype)
        of_gate, of_up = gated_slopes(inner, gate, up)
        by_gate = product(*of_gate, gate_turned, gate_scale, slope.dtype)
        return by_gate + product(*of_up, up_turned, up_scale, slope.dtype), *[None] * 12


def gated(gate: torch.Tensor, up: torch.Tensor) -> Rounded:
    """Return silu(gate) * up, rounded."""
    if gate.device.type != "cuda":  # the same numbers, slowly
        return rounded(torch.nn.functional.silu(gate) * up)
    found: Rounded = torch.ops.finetune.round_gated(gate, up)
    return found


def gated_slopes(slope: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[Rounded, Rounded]:
    """Return the gradients of gate and of up from `slope`, that of silu(gate) * up; both rounded."""
    if gate.device.type != "cuda":
        of_gate = torch.ops.aten.silu_backward(slope * up, gate)
        return rounded(of_gate), rounded(slope * torch.nn.functional.silu(gate))
    of_gate, gate_scale, of_up, up_scale = torch.ops.finetune.round_gated_slopes(slope, gate, up)
    return (of_gate, gate_scale), (of_up, up_scale)


def _difference(mlp: Any, fused: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """Compare `fused` and its gradient with those of `mlp`; return how they differ, None if they do not.

    Row by row: another activation may be like silu for small gates alone, or for large ones.
    """
    device, width = mlp.gate_proj.weight.device, mlp.gate_proj.out_features
    kernels = importlib.import_module(_KERNELS)
    if width > kernels.LARGEST_WIDTH:
        return f"a row of {width} numbers is wider than registers hold"
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(2, len(_SIZES), mlp.gate_proj.in_features, generator=generator, device=device)
    x, slope = drawn.to(mlp.gate_proj.compute_dtype)
    with torch.no_grad():
        size = mlp.gate_proj(x).float().square().mean(-1, keepdim=True).sqrt()
    x = (x / size * _SIZES[:, None].to(device)).to(slope.dtype)
    results = []
    with torch.enable_grad():
        for function in (mlp, fused):
            leaf = x.detach().requires_grad_()
            y = function(leaf)
            results.append([y.detach().float(), torch.autograd.grad(y, leaf, slope)[0].float()])
    differences = [(a - b).norm(dim=-1) / a.norm(dim=-1) for a, b in zip(*results, strict=True)]
    worst = float(torch.cat(differences).max())
    return None if worst <= _TOLERANCE else f"it differs from the model's own by {worst:.1%}"
