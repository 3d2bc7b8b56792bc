"""Products in FP8, computed here by their definition; tests/gpu runs the hardware's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from finetune_trainer.engine import fp8, modules
from finetune_trainer.runtime import patches
from support.trainer.process import job, metrics_lines, train


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_each_row_is_rounded_to_three_bits_of_mantissa_on_its_own_scale(scale: float) -> None:
    matrix = torch.randn(8, 64) * scale * torch.logspace(-3, 3, 8)[:, None]
    values, scales = fp8.rounded(matrix)
    back = values.float() * scales
    assert values.dtype == torch.float8_e4m3fn and scales.shape == (8, 1)
    large = matrix.abs() > matrix.abs().amax(-1, keepdim=True) / 1000
    assert float(((back - matrix).abs() / matrix.abs())[large].max()) <= 2**-4
    assert torch.allclose(back.abs().amax(-1), matrix.abs().amax(-1))


def test_a_row_of_zeros_stays_one() -> None:
    values, scales = fp8.rounded(torch.zeros(2, 16))
    assert not (values.float() * scales).any()


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradient_are_near_those_of_bf16(bias: bool) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 96, bias=bias).bfloat16().requires_grad_(False)
    found = []
    for layer in (linear, fp8.Fp8Linear(linear)):
        x = torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
        y = layer(x)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16())
        found.append((y.detach(), x.grad))
    for plain, ours in zip(*found, strict=True):
        assert ours is not None and plain is not None and ours.shape == plain.shape and ours.dtype == plain.dtype
        assert float((ours - plain).norm() / plain.norm()) < 0.05


def test_what_was_compiled_before_is_found_and_never_for_another_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch passes its cache over for an autograd function unless it is told otherwise."""
    torch.manual_seed(0)
    layer = fp8.Fp8Linear(torch.nn.Linear(32, 48, bias=False).bfloat16().requires_grad_(False))
    patches.configure_compiler(1.0)
    backward = fp8._Product.backward

    def halved(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return backward(ctx, slopes[0] * 0.5)

    found = []
    with fresh_cache():
        for changed in (backward, backward, backward, halved):  # torch changes settings while it compiles the first
            monkeypatch.setattr(fp8._Product, "backward", staticmethod(changed))
            torch._dynamo.reset()
            counters.clear()
            x = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
            torch.compile(layer.forward)(x).float().sum().backward()
            assert x.grad is not None
            found.append((counters["aot_autograd"]["autograd_cache_hit"], x.grad))
    assert [hits for hits, _ in found[2:]] == [1, 0]
    assert torch.equal(found[2][1], found[0][1])
    torch.testing.assert_close(found[3][1], found[0][1] * 0.5)


def test_frozen_layers_alone_are_converted_and_the_adapter_learns(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    fp8.convert(modules.decoder_layers(base)[:1])
    converted = {name for name, module in model.named_modules() if isinstance(module, fp8.Fp8Linear)}
    assert len(converted) == 7 and all(".layers.0." in name for name in converted)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == before
    ids = torch.randint(4, 300, (1, 30))
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize(
    ("changes", "reason"), [({}, "needs a GPU"), ({"lora.dora": True}, "does not go with DoRA")], ids=str
)
def test_where_it_cannot_be_the_run_goes_on_in_bf16_and_says_so(
    changes: dict[str, Any], reason: str, tiny_model: Path, tmp_path: Path
) -> None:
    finished = train(job(tmp_path, tiny_model, changes | {"training.precision": "fp8"}), tmp_path)
    assert finished.exit_code == 0, finished.log
    assert f"training.precision: fp8 {reason}; using bf16 instead" in finished.log
    assert finished.report["executionPlan"]["fp8"] is False


def _as_if_there_were_hardware() -> None:
    from finetune_trainer.engine import capabilities, fp8_mlp

    capabilities.has_fp8 = lambda *_: True
    fp8_mlp._is_hopper = lambda device: True
    fuse_one = fp8_mlp.fuse_one

    def told(mlp: Any) -> str | None:
        problem = fuse_one(mlp)
        print(f"Of one MLP: {problem or 'fused'}", flush=True)
        return problem

    fp8_mlp.fuse_one = told


@pytest.mark.parametrize(("quantization", "fused"), [({"cachedLayers": 1}, 1), ({"bits": 16}, 2)], ids=str)
def test_a_whole_run_with_simulated_hardware_publishes_an_adapter_of_plain_names(
    quantization: dict[str, Any], fused: int, tiny_model: Path, tmp_path: Path
) -> None:
    changes = {"training.precision": "fp8", "quantization": quantization, "lora.dropout": 0.0}
    finished = train(job(tmp_path, tiny_model, changes), tmp_path, before=_as_if_there_were_hardware)
    assert finished.exit_code == 0, finished.log
    assert finished.report["executionPlan"]["fp8"] is True
    assert finished.log.count("Of one MLP: fused") == finished.log.count("Of one MLP:") == fused
    assert "loaded back with PEFT and has the weights that were trained" in finished.log
    train(job(tmp_path / "plain", tiny_model, changes | {"training.precision": "bf16"}), tmp_path / "plain")
    losses = [
        [line["loss"] for line in metrics_lines(folder / "out") if "loss" in line]
        for folder in (tmp_path, tmp_path / "plain")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=3e-2)
    assert losses[0] != losses[1]


def test_the_check_at_start_finds_wrong_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fp8.self_check("cpu") is None
    assert "fails here" in (fp8.self_check("nowhere") or "")
    product, calls = fp8.product, []

    def wrong(*args: Any) -> torch.Tensor:
        calls.append(1)
        return product(*args) * (1 if len(calls) < 3 else 1.1)

    monkeypatch.setattr(fp8, "product", wrong)
    assert "differs from its definition by 10.0%" in (fp8.self_check("cpu") or "")
