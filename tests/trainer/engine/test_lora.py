"""Adapters that read the same input and share what they do to it train as PEFT's do."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_trainer.engine import lora
from finetune_trainer.engine.lora import (
    _dropped,
    seeded_dropout,
    share_lora_inputs,
    shared_lora_inputs,
)
from finetune_trainer.engine.model_loss import patch_fused_loss
from support.trainer.triton import interpreted

IDS = torch.arange(4, 44)[None]


def _model(folder: Path, **settings: Any) -> Any:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    base.config.use_cache = False
    wanted = {"r": 4, "lora_dropout": 0.0, "init_lora_weights": False, "target_modules": "all-linear"} | settings
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **wanted))
    patch_fused_loss(model.get_base_model())
    return model.train()


def _gradient(model: Any, autocast: bool = False) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=IDS, target_positions=torch.arange(39), target_ids=IDS[0, 1:])
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": ["q_proj", "v_proj"]},
        {"use_rslora": True},
        {"bias": "lora_only"},
        {"use_dora": True},
    ],
)
def test_without_dropout_the_gradient_is_that_of_peft(settings: dict[str, Any], tiny_model: Path) -> None:
    model = _model(tiny_model, **settings)
    expected = _gradient(model), _gradient(model, autocast=True)
    share_lora_inputs(model)
    assert _difference(_gradient(model), expected[0]) < 1e-5
    assert _difference(_gradient(model, autocast=True), expected[1]) < 2e-2
    share_lora_inputs(model)  # once more changes nothing
    assert _difference(_gradient(model), expected[0]) < 1e-5


def test_one_mask_serves_all_that_read_the_same_input(tiny_model: Path) -> None:
    model = _model(tiny_model, lora_dropout=0.5)
    share_lora_inputs(model)
    masks: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(lambda *_, name=name: masks.append(name.split(".lora_dropout")[0]))
    _gradient(model)
    layer = "base_model.model.model.layers.0."
    parts = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    assert [name for name in masks if name.startswith(layer)] == [layer + part for part in parts]


def test_with_dropout_the_gradient_is_that_of_peft_on_average(tiny_model: Path) -> None:
    model = _model(tiny_model, lora_dropout=0.1)
    plain = [torch.stack([_gradient(model) for _ in range(60)]) for _ in range(2)]
    share_lora_inputs(model)
    ours = torch.stack([_gradient(model) for _ in range(60)])
    noise = _difference(plain[1].mean(0), plain[0].mean(0))
    assert _difference(ours.mean(0), plain[0].mean(0)) < 2 * noise
    assert _difference(ours[0], ours[1]) > 0.05


def test_evaluation_runs_the_adapters_as_they_are(tiny_model: Path) -> None:
    model = _model(tiny_model).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        share_lora_inputs(model)
        assert torch.equal(model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj", "v_proj"]}, {"bias": "lora_only"}])
def test_added_by_our_kernel_the_gradient_is_that_of_peft(
    settings: dict[str, Any], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interpreted("lora")
    monkeypatch.setattr(lora, "_HALF", (torch.float32,))  # which the interpreter does not round
    model = _model(tiny_model, **settings)
    expected = _gradient(model)
    share_lora_inputs(model)
    for each in shared_lora_inputs(model):
        each.added_by_kernel = True
    assert _difference(_gradient(model), expected) < 1e-5


def test_a_seed_makes_a_mask() -> None:
    x = torch.ones(2000, 512, requires_grad=True)
    seeds = [torch.tensor(seed, dtype=torch.int32) for seed in (-(2**31), -1, 0, 1, 12345)]
    masks = []
    for seed in seeds:
        found = _dropped(x, 0.1, seed)
        kept = found != 0
        assert torch.equal(found.detach(), kept / 0.9)
        assert torch.equal(torch.autograd.grad(found.sum(), x)[0], kept / 0.9)
        assert torch.equal(_dropped(x, 0.1, seed), found)
        masks.append(kept.float().detach())
        for part in (kept.float().mean(0), kept.float().mean(1)):  # of every row and every column as much is kept
            expected = (0.09 * part.numel() / kept.numel()) ** 0.5
            assert part.mean().item() == pytest.approx(0.9, abs=0.002)
            assert part.std().item() == pytest.approx(expected, rel=0.15)
    neighbors = [(mask[1:], mask[:-1]) for mask in masks] + [(mask[:, 1:], mask[:, :-1]) for mask in masks]
    for one, other in [*neighbors, *itertools.pairwise(masks)]:
        assert abs(((one - 0.9) * (other - 0.9)).mean().item() / 0.09) < 0.005


def test_rows_side_by_side_have_masks_of_their_own() -> None:
    found = _dropped(torch.ones(3, 16, 64), 0.5, torch.tensor(7, dtype=torch.int32))
    assert len({tuple(row.flatten().tolist()) for row in found.flatten(0, 1)}) == 3 * 16


def test_processes_drop_different_tokens(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tiny_model, lora_dropout=0.5)
    share_lora_inputs(model)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(1)
        with seeded_dropout(shared_lora_inputs(model), torch.device("cpu")):
            found.append(_gradient(model))
    assert _difference(found[1], found[0]) > 0.05


@pytest.mark.parametrize(("rank", "dtype"), [(8, torch.float32), (512, torch.bfloat16)])
def test_what_our_kernel_does_not_add_well_torch_adds(rank: int, dtype: torch.dtype, tiny_model: Path) -> None:
    model = _model(tiny_model, r=rank, target_modules=["q_proj"]).to(dtype)
    expected = _gradient(model)
    share_lora_inputs(model)
    for each in shared_lora_inputs(model):
        each.added_by_kernel = True  # the operation itself need not even be there
    assert _difference(_gradient(model), expected) < 2e-2


def test_masks_of_a_seed_are_drawn_from_the_generator_of_torch(tiny_model: Path) -> None:
    model = _model(tiny_model, lora_dropout=0.5)
    share_lora_inputs(model)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        with seeded_dropout(shared_lora_inputs(model), torch.device("cpu")):
            found.append(_gradient(model))
    assert torch.equal(found[0], found[1])
    assert _difference(found[2], found[0]) > 0.05
