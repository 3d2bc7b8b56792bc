"""Experts are quantized as they load: each one's matrix has the bytes and the scales of bitsandbytes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model import experts
from finetune_trainer.model.base import inspect_base_model
from finetune_trainer.model.weights import load_base_model


def _load(folder: Path, **quantization: Any) -> Any:
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{folder}"},
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out"},
            "training": {"maxLength": 64},
            "quantization": quantization,
        }
    )
    base = inspect_base_model(ModelFiles(folder, None), spec)
    return load_base_model(folder, base, spec, ExecutionPlan(attention="sdpa"), "cpu")


def _quantized(model: Any) -> list[tuple[str, str, torch.Tensor, experts.Quantized]]:
    return [
        (path, name, *found)
        for path, module in model.named_modules()
        if experts.is_experts(module)
        for name in experts.MATRICES
        if (found := experts.quantized(module, name))
    ]


def _stored(folder: Path, path: str, name: str) -> torch.Tensor:
    """The experts' matrices as the checkpoint holds them: each alone."""
    files = load_file(folder / "model.safetensors")
    each = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[name]
    return torch.stack([torch.cat([files[f"{path}.{expert}.{part}.weight"] for part in each]) for expert in range(8)])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("twice", [False, True])
def test_each_matrix_is_bit_equal_to_that_of_bitsandbytes(kind: str, twice: bool, tiny_experts: Path) -> None:
    found = _quantized(_load(tiny_experts, type=kind, doubleQuant=twice, computeDtype="bfloat16"))
    assert len(found) == 4
    for path, name, packed, scales in found:
        for place, matrix in enumerate(_stored(tiny_experts, path, name)):
            expected, state = quantize_4bit(matrix, compress_statistics=twice, quant_type=kind)
            assert torch.equal(packed[place], expected.view(-1))
            assert torch.equal(scales.scales[0][place], state.absmax)
            if twice:
                assert torch.equal(scales.scales[1], state.state2.code)
                assert torch.equal(scales.scales[2][place], state.state2.absmax)
                assert torch.equal(scales.scales[3][place], state.offset)


@pytest.mark.parametrize("shape", [(4, 64, 64), (4, 64, 32), (3, 300, 64), (2, 512, 256)])
@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dequantized_they_are_what_their_scales_and_indices_say(
    shape: tuple[int, ...], twice: bool, dtype: torch.dtype
) -> None:
    """Of 300 rows the last block of scales is not whole. A row of 32 is less than a block: bitsandbytes errs there."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed, scales = experts.quantize(weight, "nf4", twice, dtype)
    for place, matrix in enumerate(weight):
        _, state = quantize_4bit(matrix, compress_statistics=twice, quant_type="nf4")
        absmax = state.absmax
        if twice:
            blocks = state.state2.absmax.repeat_interleave(256)[: len(absmax)]
            absmax = state.state2.code[absmax.int()] * blocks + state.offset
        indices = torch.stack([packed[place] >> 4, packed[place] & 15], -1).flatten().int()
        expected = state.code[indices].view(-1, 64) * absmax[:, None]
        assert torch.equal(scales(packed)[place], expected.to(dtype).view(shape[1:]))


def test_a_model_holds_them_in_four_bits_alone_and_reads_them_whole(tiny_experts: Path) -> None:
    model = _load(tiny_experts)
    assert not [name for name, each in model.named_parameters() if each.dim() == 3]
    module = model.model.layers[0].mlp.experts
    assert module.gate_up_proj.shape == (8, 128, 64) and module.gate_up_proj.dtype == torch.bfloat16
    assert experts.quantized(module, "gate_up_proj")[0].nbytes == 8 * 128 * 64 // 2  # type: ignore[index]
    assert model.quantization_method == "bitsandbytes" and model.is_loaded_in_4bit
    kept = module.gate_up_proj
    experts.keep_dequantized([model.model.layers[0]])
    assert torch.equal(dict(module.named_parameters())["gate_up_proj"], kept) and not module.gate_up_proj.requires_grad
    assert len(_quantized(model)) == 2


def test_never_are_two_layers_in_sixteen_bits_while_they_load(
    tiny_experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, most = [], 0
    quantize = experts.quantize

    def watched(weight: torch.Tensor, *settings: Any) -> Any:
        nonlocal most
        import gc
        import weakref

        gc.collect()
        alive.append(weakref.ref(weight))
        most = max(most, sum(each() is not None for each in alive))
        return quantize(weight, *settings)

    monkeypatch.setattr(experts, "quantize", watched)
    _load(tiny_experts)
    assert len(alive) == 4 and most == 1


def test_adapters_on_them_have_the_names_of_those_on_plain_ones(tiny_experts: Path) -> None:
    found = []
    for bits in (4, 16):
        model = _load(tiny_experts, bits=bits)
        settings = LoraConfig(target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
        with experts.attaching_adapters(model):
            adapted = get_peft_model(model, settings)
        assert len(_quantized(adapted)) == (4 if bits == 4 else 0)
        found.append({name: each.shape for name, each in adapted.named_parameters() if each.requires_grad})
    assert found[0] == found[1] and len(found[0]) == 12


def test_whoever_loads_a_model_and_attaches_adapters_gets_the_same_numbers_each_time(tiny_experts: Path) -> None:
    """PEFT's own pass over parametrized experts would leave its sum in the weights."""
    model = _load(tiny_experts)
    settings = LoraConfig(
        target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"], init_lora_weights=False
    )
    with experts.attaching_adapters(model):
        adapted = get_peft_model(model, settings).eval()
    rows = torch.arange(3, 20)[None]
    with torch.no_grad():
        first, second = (adapted(input_ids=rows, use_cache=False).logits for _ in range(2))
        with adapted.disable_adapter():
            without = adapted(input_ids=rows, use_cache=False).logits
    assert torch.equal(first, second) and not torch.allclose(first, without)
    assert len(_quantized(adapted)) == 4
