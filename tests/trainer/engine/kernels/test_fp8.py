"""What lies between the products of a gated MLP, rounded to e4m3: our kernels, run by Triton's interpreter."""

import pytest
import torch

from finetune_trainer.engine import fp8_mlp
from support.trainer.triton import interpreted_fp8


def _drawn(rows: int, width: int, size: float = 1.0) -> list[torch.Tensor]:
    """A slope, a gate and an up; of several rows one has no number but zero, and sizes differ."""
    torch.manual_seed(0)
    sizes = torch.logspace(-2, 1, rows)[:, None] * size
    drawn = [(torch.randn(rows, width) * sizes).half() for _ in range(3)]
    for each in drawn:
        each[1:2] = 0
    return drawn


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """A last bit may decide how a number is rounded that lies in the middle of two: by a step of e4m3, 2^-3 at most."""
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found.float(), expected.float(), rtol=2**-3, atol=2**-9)
    assert float((found.float() != expected.float()).float().mean()) < 1e-3


#: Within a part of a row, of 7 whole parts as Mistral's 14,336, of parts of which the last is cut, and of one row.
SHAPES = [(5, 112), (4, 1792), (3, 2048), (3, 1376), (1, 14336), (1, 48)]


@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_numbers_and_scales_are_those_of_the_definition(
    rows: int, width: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = interpreted_fp8(monkeypatch)
    slope, gate, up = _drawn(rows, width, size)
    for found, expected in zip(kernels.round_gated(gate, up), fp8_mlp.gated(gate, up), strict=True):
        _same(found, expected)
    of_gate, of_up = fp8_mlp.gated_slopes(slope, gate, up)
    for found, expected in zip(kernels.round_gated_slopes(slope, gate, up), (*of_gate, *of_up), strict=True):
        _same(found, expected)


def test_the_definition_of_the_gradients_is_autograds() -> None:
    slope, gate, up = _drawn(4, 64)
    leaves = gate.requires_grad_(), up.requires_grad_()
    expected = torch.autograd.grad(torch.nn.functional.silu(gate) * up, leaves, slope)
    for (values, scale), gradient in zip(fp8_mlp.gated_slopes(slope, gate, up), expected, strict=True):
        rounded, scales = fp8_mlp.rounded(gradient)
        _same(values, rounded)
        _same(scale, scales)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = interpreted_fp8(monkeypatch)
    slope, gate, up = _drawn(3, 112)
    up[0, 7] = wrong
    found, scale = kernels.round_gated(gate, up)
    assert not (found.float() * scale)[0].isfinite().all()
    assert (found.float() * scale)[1:].isfinite().all()
    of_gate, gate_scale, of_up, up_scale = kernels.round_gated_slopes(slope, gate, up)
    assert not (of_gate.float() * gate_scale)[0].isfinite().all()
    assert (of_up.float() * up_scale).isfinite().all()


def test_a_compiled_graph_holds_each_as_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = interpreted_fp8(monkeypatch)
    slope, gate, up = _drawn(3, 112)
    torch.library.opcheck(kernels.round_gated, (gate, up))
    torch.library.opcheck(kernels.round_gated_slopes, (slope, gate, up))


@pytest.mark.parametrize("width", [16, 112, 1376, 4096, 8192, 11008, 14336, 18944, 28672, 29568, 32768])
def test_a_row_lies_in_the_registers_of_its_program(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = interpreted_fp8(monkeypatch).parts_of(width)
    assert taken["OF"] * (taken["PARTS"] - 1) < width <= taken["OF"] * taken["PARTS"]
    assert taken["PARTS"] * taken["OF"] / (32 * taken["num_warps"]) <= 56
    assert taken["num_warps"] in (1, 2, 4, 8, 16, 32)
