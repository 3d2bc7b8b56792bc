"""Experts on a real GPU: bitsandbytes' weights, the products of each block, the losses of the plain path."""

from pathlib import Path
from typing import Any

import pytest

from support.trainer.gpu import losses, make_material, report, start

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: transformers' own experts, over weights that are dequantized once.
PLAIN = "from finetune_trainer.model import weights; weights.multiply_grouped = lambda model: None"
TOLERANCE = 1e-2


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("twice", [False, True])
def test_weights_are_bit_equal_to_those_of_bitsandbytes(kind: str, twice: bool) -> None:
    import finetune_trainer.engine.kernels.dequantize  # noqa: F401, registers the kernel
    from finetune_trainer.engine.dequantize import _try_kernel_on_experts
    from finetune_trainer.model.experts import quantize

    weight = torch.randn(16, 300, 256, device="cuda").bfloat16()
    assert _try_kernel_on_experts(*quantize(weight, kind, twice, torch.bfloat16)) is None


@pytest.mark.parametrize("turned", [False, True])
def test_grouped_products_and_gradients_are_those_of_each_block(turned: bool) -> None:
    from finetune_trainer.model import grouped_experts
    from finetune_trainer.model.experts import quantize

    assert grouped_experts.self_check(torch.device("cuda", 0)) is None
    torch.manual_seed(0)
    packed, scales = quantize(torch.randn(4, 256, 128, device="cuda").bfloat16(), "nf4", True, torch.bfloat16)
    weight = scales(packed).transpose(-2, -1) if turned else scales(packed)
    ends = torch.tensor([100, 100, 257, 1000], dtype=torch.int32, device="cuda")
    x = torch.randn(1000, weight.shape[2], device="cuda").bfloat16().requires_grad_()
    found = grouped_experts.grouped_4bit(
        x, packed, scales.scales, scales.code, scales.shape, ends, turned, scales.method
    )
    blocks = zip([0, 100, 100, 257], ends.tolist(), strict=True)
    expected = torch.cat([x[begin:end] @ each.T for (begin, end), each in zip(blocks, weight, strict=True)])
    slope = torch.randn_like(found)
    pairs = [(found, expected), [torch.autograd.grad(each, x, slope)[0] for each in (found, expected)]]
    assert max(float((a - b).norm() / b.norm()) for a, b in pairs) <= TOLERANCE


def _losses(material: Path, work: Path, prelude: str = "", **settings: Any) -> list[float]:
    run = start(material, work, prelude, lora__dropout=0.0, training__maxSteps=100, **settings)
    log, _ = run.communicate(timeout=900)
    assert run.returncode == 0, log[-3000:]
    assert "multiplied one by one" not in log and "kernel disabled for experts" not in log
    return losses(work)


def test_losses_are_those_of_the_plain_path_at_every_one_of_100_steps(tmp_path: Path) -> None:
    material = make_material(tmp_path / "material", experts=16)
    plain = _losses(material, tmp_path / "plain", PLAIN, training__compile="disabled", quantization__cachedLayers=4)
    ours = _losses(material, tmp_path / "ours", quantization__cachedLayers=0)
    assert report(tmp_path / "ours")["executionPlan"]["compiled"]
    print("RESULT largest difference:", max(abs(a / b - 1) for a, b in zip(ours, plain, strict=True)))
    assert ours == pytest.approx(plain, rel=TOLERANCE)
