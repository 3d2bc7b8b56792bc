"""Grouped products of 4-bit experts compute what transformers' own experts do with the dequantized weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch.utils.flop_counter import FlopCounterMode

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import dequantize
from finetune_trainer.engine.compilation import configure_layers
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.modules import decoder_layers
from finetune_trainer.model import experts, grouped_experts
from finetune_trainer.model.counts import count_weights
from finetune_trainer.planning import memory
from finetune_trainer.planning.model_shape import ModelShape
from support.trainer import families
from support.trainer.process import job, train
from support.trainer.triton import interpreted

#: By what is special about the layout: two matrices in one, turned with biases and another gate, no gate, shared
#: experts beside them.
LAYOUTS = {"fused": "qwen3_moe", "turned": "gpt_oss", "no gate": "nemotron_h", "shared": "qwen2_moe"}
EXPERTS = ["experts.gate_up_proj", "experts.up_proj", "experts.down_proj"]
ROWS = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))


def _quantized(kind: str, dtype: torch.dtype, **options: Any) -> Any:
    model = families.tiny_model(kind, **options).to(dtype).requires_grad_(False)
    for module in model.modules():
        for name in experts.MATRICES if experts.is_experts(module) else ():
            if name in module._parameters and experts.fits(module._parameters[name]):
                packed, scales = experts.quantize(module._parameters[name], "nf4", True, dtype)
                module._parameters[name] = torch.nn.Parameter(packed, requires_grad=False)
                torch.nn.utils.parametrize.register_parametrization(module, name, scales, unsafe=True)
    return model


def _pair(
    kind: str, dtype: torch.dtype = torch.float32, targets: list[str] = EXPERTS, **options: Any
) -> tuple[Any, Any]:
    """The same adapters on transformers' own experts, with dequantized weights, and on ours."""
    plain, ours = _quantized(kind, dtype, **options), _quantized(kind, dtype, **options)
    experts.keep_dequantized([plain])
    plain.set_experts_implementation("grouped_mm")
    grouped_experts.multiply_grouped(ours)
    found = []
    for model in (plain, ours):
        torch.manual_seed(1)
        settings = LoraConfig(
            r=8, target_modules=["q_proj", "v_proj"], target_parameters=targets, init_lora_weights=False
        )
        with experts.attaching_adapters(model):
            found.append(get_peft_model(model, settings).train())
    return found[0], found[1]


def _gradients(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    loss = model(input_ids=ROWS, labels=ROWS, use_cache=False).loss
    loss.backward()
    return loss.detach(), torch.cat([each.grad.flatten() for each in model.parameters() if each.requires_grad])


@pytest.mark.parametrize("kind", LAYOUTS.values(), ids=LAYOUTS)
def test_loss_and_gradients_of_a_step_are_those_of_the_plain_path(kind: str) -> None:
    plain, ours = map(_gradients, _pair(kind))
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=0)
    assert float((ours[1] - plain[1]).norm() / plain[1].norm()) < 1e-5


def test_in_half_precision_frozen_experts_are_bit_equal() -> None:
    """PEFT rounds the sum of weights and adapter to bfloat16; without adapters on experts there is no such sum."""
    plain, ours = (_gradients(model) for model in _pair("qwen3_moe", torch.bfloat16, []))
    assert torch.equal(ours[0], plain[0])
    assert float((ours[1] - plain[1]).norm() / plain[1].norm()) < 1e-2


def test_a_hundred_steps_have_the_losses_of_the_plain_path() -> None:
    found = []
    for model in _pair("qwen3_moe"):
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-3)
        losses = []
        for _ in range(100):
            losses.append(float(_gradients(model)[0]))
            optimizer.step()
        found.append(losses)
    assert found[1][-1] < 0.8 * found[1][0]
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_adapters_that_are_disabled_change_nothing() -> None:
    _, ours = _pair("qwen3_moe")
    with torch.no_grad(), ours.disable_adapter():
        without = ours(input_ids=ROWS, use_cache=False).logits
        assert torch.equal(without, ours.get_base_model()(input_ids=ROWS, use_cache=False).logits)
    with torch.no_grad():
        assert not torch.allclose(without, ours(input_ids=ROWS, use_cache=False).logits)


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputed_and_compiled_layers_have_the_same_gradients(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward: compile_(forward, backend="aot_eager"))
    _, ours = _pair("qwen3_moe")
    expected = _gradients(ours)
    configure_layers(decoder_layers(ours.get_base_model()), checkpointed=1, compiled=compiled)
    torch.testing.assert_close(_gradients(ours), expected, rtol=1e-4, atol=1e-6)


def test_no_pass_keeps_dequantized_weights_or_inputs_of_frozen_experts() -> None:
    kept: list[tuple[int, ...]] = []
    _, ours = _pair("qwen3_moe", targets=[])
    module = decoder_layers(ours.get_base_model())[0].mlp.experts
    x = torch.randn(48, 64, requires_grad=True)
    index, weights = torch.randint(0, 4, (48, 2)), torch.rand(48, 2)
    with torch.autograd.graph.saved_tensors_hooks(lambda each: (kept.append(tuple(each.shape)), each)[1], lambda e: e):
        module(x, index, weights).sum().backward()
    assert not [shape for shape in kept if len(shape) == 3 and shape[0] == 4]
    assert (96, 64) not in kept  # the sorted tokens


@pytest.mark.parametrize("turned", [False, True])
def test_products_are_registered_as_torch_wants_them(turned: bool) -> None:
    weight = torch.randn(3, 64, 32)
    packed, scales = experts.quantize(weight, "nf4", True, torch.float32)
    x = torch.randn(10, 64 if turned else 32, requires_grad=True)
    ends = torch.tensor([4, 4, 10], dtype=torch.int32)  # the second expert has no rows
    arguments = (x, packed, scales.scales, scales.code, scales.shape, ends, turned, "nf4")
    torch.library.opcheck(grouped_experts.grouped_4bit, arguments)
    with FlopCounterMode(display=False) as counter:
        grouped_experts.grouped_4bit(*arguments)
    assert counter.get_total_flops() == 2 * 10 * 64 * 32
    torch.library.opcheck(grouped_experts.grouped, (x.detach().requires_grad_(), torch.randn(3, 5, x.shape[1]), ends))
    trained = torch.randn(3, 5, x.shape[1], dtype=torch.float64, requires_grad=True)
    leaf = x.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: grouped_experts.grouped(a, b, ends), (leaf, trained))


@pytest.mark.parametrize("shape", [(4, 64, 32), (3, 300, 64)])
@pytest.mark.parametrize("twice", [False, True])
def test_our_kernel_dequantizes_each_matrix_bit_for_bit(shape: tuple[int, ...], twice: bool) -> None:
    interpreted("dequantize")
    for dtype in (torch.float16, torch.float32):
        packed, scales = experts.quantize(torch.randn(shape), "nf4", twice, dtype)
        assert dequantize._try_kernel_on_experts(packed, scales) is None
        expected = scales(packed)
        scales.method = experts.KERNEL
        assert torch.equal(scales(packed), expected)


def test_other_numbers_than_those_of_bitsandbytes_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, scales = experts.quantize(torch.randn(2, 64, 64), "nf4", True, torch.float32)
    real = experts.dequantize
    monkeypatch.setattr(dequantize, "dequantize", lambda *a: real(*a[:-1], "nf4") + (a[-1] == experts.KERNEL))
    assert (
        dequantize._try_kernel_on_experts(packed, scales) == "it computes other weights than bitsandbytes on this GPU"
    )


def _kept_per_token(model: Any) -> float:
    """Bytes that a decoder layer keeps for its backward pass, in the half precision of training."""
    core, tokens, kept = model.get_base_model(), 256, {}
    x = torch.randn(1, tokens, core.config.hidden_size, dtype=torch.bfloat16).requires_grad_()
    embedded = [each.detach() for each in core.model.rotary_emb(x, torch.arange(tokens)[None])]
    not_kept = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers(), *embedded]}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_kept:
            kept[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that no other takes its place
        return tensor

    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        decoder_layers(core)[0](x, position_embeddings=embedded, attention_mask=None)
    return float(sum(size for _, size in kept.values())) / tokens


@pytest.mark.parametrize("names", [[], ["gate_proj", "up_proj", "down_proj"]], ids=["attention", "experts"])
def test_what_a_layer_keeps_is_predicted(names: list[str]) -> None:
    """Within 10 %, as memory is. The rest of the prediction is that of dense models."""
    sizes = {"hidden_size": 512, "head_dim": 64, "num_attention_heads": 8, "num_local_experts": 16}
    options = {**sizes, "num_experts_per_tok": 8, "intermediate_size": 192}
    with torch.device("meta"):
        counts = count_weights(families.tiny_model("mixtral", **options))
    model = _pair("mixtral", torch.bfloat16, EXPERTS if names else [], **options)[1]
    share_lora_inputs(model)
    targets = ["q_proj", "v_proj", *names]
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base"},
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out"},
            "lora": {"rank": 8, "dropout": 0.0, "targetModules": targets},
        }
    )
    shape = ModelShape.from_config(model.config.to_dict(), counts)
    assert shape is not None
    assert memory._saved_per_token(shape, spec, 2) == pytest.approx(_kept_per_token(model), rel=0.1)


def test_what_torch_does_not_group_is_multiplied_one_by_one_for_a_reason() -> None:
    here = torch.device("cpu")
    assert "of bfloat16, and these are of float16" in str(grouped_experts._ungrouped([2, 64, 64], torch.float16, here))
    assert "[60, 64] are no multiples of 8" in str(grouped_experts._ungrouped([2, 60, 64], torch.bfloat16, here))
    assert grouped_experts._ungrouped([2, 64, 64], torch.bfloat16, here) is None


def test_grouped_products_are_checked_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch has them on CPUs too; an expert without rows gets a gradient of zeros."""
    check, here = grouped_experts.self_check.__wrapped__, torch.device("cpu")
    assert check(here) is None
    real = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *args, **options: 1.1 * real(*args, **options))
    assert "torch's grouped products differ from single ones by 10.0% here" in str(check(here))
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None)
    assert "torch's grouped products fail here: TypeError" in str(check(here))


def test_any_rank_is_multiplied_in_groups() -> None:
    _, ours = _pair("qwen3_moe")
    wrapper = next(each for each in ours.modules() if isinstance(each, ParamWrapper))
    for rank in (3, 8):
        wrapper.update_layer("default", rank, 16, LoraConfig(init_lora_weights=False))
        a, b = grouped_experts._low_rank(wrapper)
        assert a.shape[1] == b.shape[2] == 8
        torch.testing.assert_close(b @ a, wrapper.get_delta_weight("default"))


def test_a_job_trains_publishes_and_verifies_adapters_on_experts(tiny_experts: Path, tmp_path: Path) -> None:
    """Of its two layers one is kept dequantized. It answers too: TRL would have experts balanced, which fails then."""
    changes = {
        "lora.targetModules": ["q_proj", "gate_proj", "up_proj", "down_proj"],
        "quantization.cachedLayers": 1,
        "training.maxSteps": 2,
        "evaluation": {"everySteps": 2, "metrics": ["loss", "nli"], "generation": {"maxNewTokens": 2}},
    }
    finished = train(job(tmp_path, tiny_experts, changes), tmp_path)
    assert finished.exit_code == 0, finished.log
    assert "loaded back with PEFT and computes the same" in finished.log
    assert "stay in 16 bits" not in finished.log
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert sorted(config["target_parameters"]) == ["down_proj", "gate_up_proj"]


def test_zeros_of_experts_without_rows_can_be_left_out() -> None:
    slope, x = torch.randn(24, 32).bfloat16(), torch.randn(24, 16).bfloat16()
    ends = torch.tensor([10, 10, 24], dtype=torch.int32)
    filled, other = (grouped_experts._outer(slope, x, ends, True, each) for each in (True, False))
    assert torch.equal(filled[[0, 2]], other[[0, 2]]) and not filled[1].any()
    plain = [grouped_experts.grouped_outer(slope, x, ends, each) for each in (True, False)]
    assert torch.equal(*plain)
