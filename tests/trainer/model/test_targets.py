"""What gets an adapter: on every kind of model the right layers, and what cannot be is said before weights load."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from finetune_api.spec_training import Lora
from finetune_api.status import ExecutionPlan
from finetune_trainer.checkpoints.parse import require_fit
from finetune_trainer.data.batching import Collate
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.adapter import adapter_weights, attach_adapter, save_adapter
from finetune_trainer.model.base import BaseModel
from finetune_trainer.model.targets import Rehearsal, adapter_settings, check_trained_whole
from finetune_trainer.publishing.adapter_checks import compare_losses, require_same
from finetune_trainer.publishing.artifact import Trained, VerificationFailed
from support.trainer import family_report
from support.trainer.families import KINDS, tiny_model

ROWS = [list(range(5, 25)), list(range(40, 52))]
BATCH = Collate(False, 0)([(row, row) for row in ROWS])


def _rehearsed(kind: str, **lora: Any) -> tuple[Any, Rehearsal]:
    with torch.device("meta"):
        skeleton = tiny_model(kind)
    return adapter_settings(skeleton, Lora.model_validate(lora), "org/base", None)


def _settings(kind: str, **lora: Any) -> Any:
    return _rehearsed(kind, **lora)[0]


def _attach(kind: str, **lora: Any) -> tuple[Any, Any]:
    """The adapted model, and the plain one."""
    model = tiny_model(kind)
    plain = copy.deepcopy(model).eval()
    base = BaseModel("org/base", None, model.config, None, None, (), True, adapter=_settings(kind, **lora))
    adapted = attach_adapter(model, base, Lora.model_validate(lora))
    patch_fused_loss(adapted.get_base_model())
    share_lora_inputs(adapted)
    return adapted.train(), plain


def _step(adapted: Any) -> None:
    optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], lr=1e-2)
    for _ in range(2):  # B begins as zeros, so A learns from the second step on
        adapted(**BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()


def _trained(adapted: Any) -> set[str]:
    return {name for name, each in adapted.named_parameters() if each.requires_grad}


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits
    return found


@pytest.mark.parametrize("kind", KINDS.values())
def test_all_linear_trains_on_every_kind_of_model_and_loads_back(kind: str, tmp_path: Path) -> None:
    adapted, plain = _attach(kind, targetModules=["all-linear"], rank=4)
    core = adapted.get_base_model()
    core.fused_loss.own = kind in ("llama4", "modernbert-decoder", "bert")
    _step(adapted)
    untrained = [name for name, each in adapted.named_parameters() if "lora_B" in name and not each.any()]
    assert not untrained, "no gradient has reached them"
    save_adapter(adapted, tmp_path)
    require_fit(tmp_path, _rehearsed(kind, targetModules=["all-linear"], rank=4)[1].tensors)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(_logits(loaded), _logits(core), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl", "mistral3", "llava"])
def test_of_a_multimodal_model_the_language_part_alone_is_trained(kind: str) -> None:
    for targets in (["all-linear"], ["q_proj", "k_proj", "v_proj"]):
        adapted, _ = _attach(kind, targetModules=targets)
        trained = _trained(adapted)
        assert trained
        assert all("language_model" in name for name in trained)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_experts_train_without_dropout_and_the_log_says_so(
    kind: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    adapted, _ = _attach(kind, targetModules=["all-linear"], dropout=0.25)
    assert "spec.lora.dropout: 0.25 is for linear layers alone: experts take none" in capsys.readouterr().out
    assert any("experts" in name for name in _trained(adapted))
    rates = {m.p for name, m in adapted.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" in name}
    assert rates == {0.25}


def test_experts_are_named_as_they_were() -> None:
    adapted, _ = _attach("qwen3_moe", targetModules=["q_proj", "gate_proj", "up_proj", "down_proj"], dropout=0.0)
    assert any("experts" in name for name in _trained(adapted))
    with pytest.raises(ConfigInvalid, match=r"it has k_proj, .*, and in its experts down_proj, gate, gate_proj"):
        _settings("qwen3_moe", targetModules=["w1"])
    with pytest.raises(ConfigInvalid, match=r"spec.lora: PEFT refuses it: Cannot convert PEFT target"):
        _settings("qwen3_moe", targetModules=["gate_proj"])


def test_dora_on_experts_is_refused_before_weights_load() -> None:
    with pytest.raises(ConfigInvalid, match=r"spec.lora: PEFT refuses it: .*use_dora"):
        _settings("qwen3_moe", targetModules=["all-linear"], dora=True)


@pytest.mark.parametrize(
    ("kind", "has"),
    [
        ("phi3", "down_proj, gate_up_proj, o_proj, qkv_proj"),
        ("gpt2", "c_attn, c_fc, c_proj"),
        ("falcon", "dense, dense_4h_to_h, dense_h_to_4h, query_key_value"),
    ],
)
def test_fused_projections_are_named(kind: str, has: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"'q_proj' is no linear layer of this model; it has {has}"):
        _settings(kind)


@pytest.mark.parametrize(("kind", "name"), [("mamba", "out_proj"), ("falcon_h1", "out_proj"), ("llama4", "router")])
def test_layers_that_can_have_no_adapter_are_refused_by_name(kind: str, name: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"'{name}' is no linear layer of this model"):
        _settings(kind, targetModules=[name])


def test_a_pattern_takes_the_place_of_names() -> None:
    adapted, _ = _attach("llama", targetPattern=r".*layers\.1\.self_attn\.(q|v)_proj")
    assert len(_trained(adapted)) == 4
    assert all("layers.1.self_attn" in name for name in _trained(adapted))


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("q_proj", "matches no linear layer of this model; a name is matched whole, such as model.layers.0.self_attn"),
        ("(", "is no regular expression: missing"),
        (".*", "PEFT refuses it: Target module"),
    ],
)
def test_a_pattern_that_cannot_be_is_explained(pattern: str, problem: str) -> None:
    with pytest.raises(ConfigInvalid, match=problem):
        _settings("llama", targetPattern=pattern)


def test_some_layers_are_adapted() -> None:
    for targets in (["q_proj"], ["all-linear"]):
        adapted, _ = _attach("llama", targetModules=targets, layersToTransform=[1])
        assert all("layers.1." in name for name in _trained(adapted))
    with pytest.raises(ConfigInvalid, match="layersToTransform: 2 is beyond the model's 2 layers, which count from 0"):
        _settings("llama", layersToTransform=[0, 2])


def test_whole_modules_are_trained_in_float32_and_published(tmp_path: Path) -> None:
    adapted, plain = _attach("llama", modulesToSave=["lm_head", "embed_tokens"])
    before = _logits(adapted.get_base_model())
    saved = {name for name in _trained(adapted) if "modules_to_save" in name}
    assert len(saved) == 2
    _step(adapted.train())
    assert not torch.equal(_logits(adapted.get_base_model()), before)
    save_adapter(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(_logits(loaded), _logits(adapted.get_base_model()), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigInvalid, match=r"spec.lora.modulesToSave: 'head' is no module of this model; it has"):
        _settings("llama", modulesToSave=["head"])


@pytest.mark.parametrize("kind", ["laguna", "inkling2_text"])
def test_layers_whose_adapter_would_not_load_back_get_none_and_the_log_says_so(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """PEFT renames what it loads as transformers renames checkpoints: some names that are right come out wrong."""
    adapted, plain = _attach(kind, targetModules=["all-linear"])
    assert "layers get no adapter, for PEFT does not load it back under their names" in capsys.readouterr().out
    _step(adapted)
    save_adapter(adapted, tmp_path)
    loaded = PeftModel.from_pretrained(plain, str(tmp_path))
    assert len(_trained(adapted)) > 2
    require_same(adapter_weights(loaded), adapter_weights(adapted), "hand")


def test_an_adapter_that_does_not_load_back_is_never_published(tmp_path: Path) -> None:
    """Were those layers adapted all the same, verification would not let it pass, however close the loss is."""
    model = tiny_model("laguna")
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    base = BaseModel("org/base", None, model.config, None, None, (), True, adapter=settings)
    adapted = attach_adapter(model, base, Lora.model_validate({"dropout": 0.0}))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    save_adapter(adapted, tmp_path)
    spec = family_report.SPEC
    check = compare_losses(Trained(spec, adapted, base, ExecutionPlan()), _SameLoss())
    with pytest.raises(VerificationFailed, match="loaded back, has other weights than were trained"):
        check(tmp_path, "hand")


class _SameLoss:
    def loss_of(self, model: Any) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("kind", "wanted", "bits", "layer"),
    [
        ("llama", "mlp", 4, "model.layers.0.mlp.gate_proj"),
        ("llama", "q_proj", 8, "model.layers.0.self_attn.q_proj"),
        ("qwen3_moe", "mlp.experts", 4, "model.layers.0.mlp.experts"),
        ("qwen3_moe", "mlp.experts", 8, None),
        ("llama", "mlp", 16, None),
        ("llama", "lm_head", 4, None),
        ("llama", "embed_tokens", 4, None),
    ],
)
def test_what_is_quantized_is_not_trained_whole(kind: str, wanted: str, bits: int, layer: str | None) -> None:
    with torch.device("meta"):
        skeleton = tiny_model(kind)
    lora = Lora.model_validate({"modulesToSave": [wanted]})
    if layer is None:
        check_trained_whole(skeleton, lora, bits)
        return
    said = rf"spec.lora.modulesToSave: '{wanted}' holds {layer}, which is quantized to {bits} bits .*bits: 16, or"
    with pytest.raises(ConfigInvalid, match=said):
        check_trained_whole(skeleton, lora, bits)
