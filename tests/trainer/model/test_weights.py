"""The weights as they are loaded: stored in 4 bits, they stay bit for bit what they are."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from safetensors.torch import load_file

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.proof import prove
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model.base import inspect_base_model
from finetune_trainer.model.checkpoint import check_weights
from finetune_trainer.model.weights import load_base_model
from support.trainer import family_report
from support.trainer.families import tiny_model


def _spec(folder: Path, **quantization: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{folder}"},
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out"},
            "training": {"maxLength": 64},
            "quantization": quantization,
        }
    )


@pytest.fixture(scope="module")
def stored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose weights are stored in bitsandbytes' 4 bits, as many on the hub are (*-bnb-4bit)."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("bnb-4bit")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float16"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=settings, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def _load(folder: Path, spec: FineTuneJobSpec) -> Any:
    base = inspect_base_model(ModelFiles(folder, None), spec)
    check_weights(folder, base, spec)
    return load_base_model(folder, base, spec, ExecutionPlan(attention="sdpa"), "cpu")


def test_weights_stored_in_four_bits_load_as_they_are(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = _load(stored, _spec(stored)).state_dict()
    files = load_file(stored / "model.safetensors")
    assert any("absmax" in name for name in files)
    assert {name for name in files if name.endswith("proj.weight")} <= set(loaded)
    assert all(torch.equal(loaded[name], each) for name, each in files.items() if name in loaded)
    said = capsys.readouterr().out
    assert "bnb_4bit_quant_type is fp4, whatever spec.quantization says" in said
    assert "double_quant" not in said


def test_the_spec_says_how_stored_weights_compute(stored: Path) -> None:
    model = _load(stored, _spec(stored, computeDtype="bfloat16"))
    assert model.model.layers[0].self_attn.q_proj.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [8, 16])
def test_stored_weights_are_not_turned_into_others(bits: int, stored: Path) -> None:
    with pytest.raises(ConfigInvalid, match=f"spec.quantization.bits: {bits}, but the weights of .* 4 bits; set 4"):
        _load(stored, _spec(stored, bits=bits))


def test_stored_weights_that_are_missing_are_named(stored: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = shutil.copytree(stored, tmp_path / "model")
    weights = {k: v for k, v in load_file(folder / "model.safetensors").items() if "norm.weight" not in k}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigInvalid, match=r"lack model\.layers\.0\.input_layernorm"):
        _load(folder, _spec(folder))


def test_eight_bits_are_for_linear_layers_but_not_for_those_that_are_read_past(tmp_path: Path) -> None:
    """Mamba's kernels would read packed bytes."""
    plain = tiny_model("mamba")
    plain.save_pretrained(tmp_path)
    quantization = family_report.SPEC.quantization.model_copy(update={"bits": 8, "compute_dtype": "fp32"})
    spec = family_report.SPEC.model_copy(update={"quantization": quantization})
    base = family_report.base_model(plain, "mamba")
    model = load_base_model(tmp_path, base, spec, ExecutionPlan(attention="eager"), "cpu")
    layers = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert [layers[name] is Linear8bitLt for name in ("in_proj", "x_proj", "out_proj")] == [True, False, False]
    findings = prove(model, spec, family_report.plan(model), family_report.ROWS, 0)
    own, whole = (family_report.own_loss(each.eval(), findings.attention) for each in (model, plain))
    torch.testing.assert_close(model(**family_report.batches()["padded"]), own, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(own, whole, rtol=1e-2, atol=1e-1)
    family_report.one_step(model, "mamba")
