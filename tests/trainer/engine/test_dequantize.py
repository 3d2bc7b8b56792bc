"""4-bit weights that are kept dequantized are the same numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from finetune_trainer.engine import modules
from finetune_trainer.engine.dequantize import dequantized, keep_dequantized
from finetune_trainer.model.weights import keep_weights_trainable
from support.trainer.process import job, metrics_lines, train


def _quantized(tiny_model: Path, **settings: Any) -> Any:
    wanted = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | settings
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **wanted)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=config, dtype=torch.bfloat16)
    keep_weights_trainable(model)
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("twice", [False, True])
def test_every_weight_is_bit_equal_and_so_is_the_gradient_of_its_input(
    kind: str, twice: bool, tiny_model: Path
) -> None:
    model = _quantized(tiny_model, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=twice)
    seen = 0
    for linear in (module for module in model.modules() if isinstance(module, Linear4bit)):
        plain = dequantized(linear)
        assert plain.weight.dtype == torch.bfloat16 and not plain.weight.requires_grad
        assert torch.equal(plain.weight, dequantize_4bit(linear.weight.data, linear.weight.quant_state))
        leaves = [torch.randn(6, linear.in_features, generator=_seeded()).bfloat16().requires_grad_() for _ in "ab"]
        outputs = [layer(leaf) for layer, leaf in zip((linear, plain), leaves, strict=True)]
        torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-2, atol=2e-2)  # one is summed in another order
        for output in outputs:
            output.backward(torch.randn(output.shape, generator=_seeded()).bfloat16())
        assert torch.equal(leaves[1].grad, leaves[0].grad)  # type: ignore[arg-type]
        seen += 1
    assert seen == 14


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_only_the_layers_asked_for_are_kept_so_and_the_adapter_has_the_same_names(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    names = []
    for kept in (0, 1):
        model = _quantized(tiny_model)
        keep_dequantized(modules.decoder_layers(model)[:kept])
        four_bits = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
        assert len(four_bits) == 14 - 7 * kept
        assert all(f"layers.{kept}." in name or kept == 0 for name in four_bits)
        adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
        names.append([name for name, parameter in adapted.named_parameters() if parameter.requires_grad])
    assert names[0] == names[1]


def test_a_run_that_keeps_layers_has_the_losses_of_one_that_does_not(tiny_model: Path, tmp_path: Path) -> None:
    found = []
    for kept in (0, 1, 1000):
        config = job(tmp_path / str(kept), tiny_model, {"quantization.cachedLayers": kept, "lora.dropout": 0.0})
        finished = train(config, tmp_path / str(kept))
        assert finished.exit_code == 0, finished.log
        assert finished.report["executionPlan"]["cachedLayers"] == min(kept, 2)
        found.append([line["loss"] for line in metrics_lines(tmp_path / str(kept) / "out") if "loss" in line])
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=5e-3)
