"""A checkpoint that is not whole is refused by name: nothing trains on random weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model.base import inspect_base_model
from finetune_trainer.model.checkpoint import _check_file, check_weights
from finetune_trainer.model.finite import is_finite
from finetune_trainer.model.weights import load_base_model

Weights = dict[str, torch.Tensor]


def _spec(folder: Path, **sections: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{folder}"},
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out"},
            "training": {"maxLength": 64},
        }
        | sections
    )


def _check(folder: Path) -> None:
    spec = _spec(folder)
    check_weights(folder, inspect_base_model(ModelFiles(folder, None), spec), spec)


def _load(folder: Path, spec: FineTuneJobSpec) -> Any:
    base = inspect_base_model(ModelFiles(folder, None), spec)
    check_weights(folder, base, spec)
    return load_base_model(folder, base, spec, ExecutionPlan(attention="sdpa"), "cpu")


def _copy(tiny_model: Path, folder: Path, change: Callable[[Weights], Weights] = lambda weights: weights) -> Path:
    shutil.copytree(tiny_model, folder)
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def _without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def _with(name: str, weight: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: weight}


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (_without("lm_head"), r"lack lm_head.weight$"),
        (_without("layers.1."), r"lack model.layers.1.input_layernorm.weight, .* and 4 more$"),
        (lambda weights: {f"x.{name}": each for name, each in weights.items()}, r"lack .*; it holds x.lm_head.weight"),
        (_with(NORM, torch.ones(3)), r"config.json: model.norm.weight has shape \[3\], the model's has \[64\]$"),
    ],
    ids=["no head", "no layer", "prefix", "shape"],
)
def test_weights_that_are_not_all_there_are_named(
    change: Callable[[Weights], Weights], sentence: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigInvalid, match=sentence):
        _check(_copy(tiny_model, tmp_path / "model", change))


@pytest.mark.parametrize(
    ("name", "value", "bits"),
    [(NORM, "nan", 4), (UP, "nan", 4), (UP, "-inf", 4), (UP, "nan", 8), (NORM, "-inf", 16), (UP, "nan", 16)],
)
def test_a_value_that_is_no_number_is_found_and_named(
    name: str, value: str, bits: int, tiny_model: Path, tmp_path: Path
) -> None:
    """One is enough, also in a matrix that is quantized: its 4 bits are numbers again."""

    def change(weights: Weights) -> Weights:
        weights[name].view(-1)[-3] = float(value)
        return weights

    folder = _copy(tiny_model, tmp_path / "model", change)
    with pytest.raises(ConfigInvalid, match=f"model.safetensors of .* has NaN or infinity in {name}$"):
        _load(folder, _spec(folder, quantization={"bits": bits}))


def test_values_whose_sum_overflows_load(tiny_model: Path, tmp_path: Path) -> None:
    largest = torch.full((64,), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    folder = _copy(tiny_model, tmp_path / "model", _with(NORM, largest))
    assert torch.equal(_load(folder, _spec(folder)).state_dict()[NORM], largest)


def test_weights_without_a_place_are_said_and_not_loaded(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _check(_copy(tiny_model, tmp_path / "model", _with("visual.proj.weight", torch.ones(3))))
    assert "has no place for are not loaded: visual.proj.weight" in capsys.readouterr().out


def test_a_whole_checkpoint_says_nothing(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    _check(tiny_model)
    assert "Weights" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: data[: len(data) // 2], "model.safetensors of .* is cut or damaged"),
        (lambda data: data[:4], "model.safetensors of .* is cut or damaged"),
        (lambda data: b"", "model.safetensors of .* is cut or damaged"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "model.safetensors of .* is a Git LFS pointer, not the file it stands for",
        ),
        (lambda data: b"<html>not found</html>", "model.safetensors of .* is cut or damaged"),
    ],
    ids=["half", "four bytes", "empty", "pointer", "a web page"],
)
def test_a_file_that_cannot_be_read_is_named(
    damage: Callable[[bytes], bytes], sentence: str, tiny_model: Path, tmp_path: Path
) -> None:
    file = _copy(tiny_model, tmp_path / "model") / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigInvalid, match=sentence):
        _check(file.parent)


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        ('{"weight_map": {"lm_head.weight": "part-2.safetensors"}}', "lacks part-2.safetensors, which its model.safe"),
        ("{", "model.safetensors.index.json of .* is no index of weights"),
        ('{"weight_map": ["a"]}', "is no index of weights"),
        (None, "has neither model.safetensors nor model.safetensors.index.json, .* it has part-1.safetensors"),
    ],
)
def test_an_index_names_files_that_are_there(
    index: str | None, sentence: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = _copy(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    if index:
        (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigInvalid, match=sentence):
        _check(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
def test_large_sums_are_no_infinity_and_nan_is_never_overlooked(dtype: torch.dtype) -> None:
    large = torch.full((1000,), torch.finfo(dtype).max).to(dtype)
    assert is_finite(large)
    large[777] = float("nan")
    assert not is_finite(large)


def test_values_of_every_type_are_read(tmp_path: Path) -> None:
    """Also of those for which torch has no sums."""
    for dtype in ("F4", "F8_E8M0", "F8_E5M2FNUZ", "U64", "C64", "BOOL"):
        count = {"F4": 32, "U64": 2, "C64": 2}.get(dtype, 16)
        header = json.dumps({"a": {"dtype": dtype, "shape": [count], "data_offsets": [0, 16]}}).encode()
        (tmp_path / dtype).write_bytes(len(header).to_bytes(8, "little") + header + b"\1" * 16)
        _check_file(tmp_path / dtype, "hf://a/b", quantized=True)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.bool])
def test_quantized_numbers_without_a_word_of_it_are_refused(
    dtype: torch.dtype, tiny_model: Path, tmp_path: Path
) -> None:
    """transformers would take them for weights, and their scales for tensors without a place."""
    folder = _copy(tiny_model, tmp_path / "model", _with(NORM, torch.ones(64).to(dtype)))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ConfigInvalid, match=rf"has {NORM} as {kind}, whose numbers mean nothing without scales"):
        _check(folder)


def test_masks_are_integers_in_some_checkpoints(tiny_model: Path, tmp_path: Path) -> None:
    _check(_copy(tiny_model, tmp_path / "model", _with("model.layers.0.attn.bias", torch.ones(4, 4).byte())))


def test_a_folder_in_the_place_of_the_weights_is_explained(tiny_model: Path, tmp_path: Path) -> None:
    folder = _copy(tiny_model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ConfigInvalid, match=r"has neither model\.safetensors nor"):
        _check(folder)


def test_an_adapter_beside_the_base_is_ignored(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers would put it into the model."""
    folder = _copy(tiny_model, tmp_path / "model")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    names = set(plain.state_dict())
    get_peft_model(plain, LoraConfig(target_modules=["q_proj"])).save_pretrained(str(folder))
    spec = _spec(folder, quantization={"bits": 16})
    loaded = _load(folder, spec)
    assert "it is ignored, the base model is used" in capsys.readouterr().out
    assert set(loaded.state_dict()) == names


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hidden_size": "64"}, r"hidden_size.*expected int, got str"),
        ({"num_hidden_layers": None}, "no usable causal language model"),
        ({"model_type": "t5"}, "models of this type are none|has an encoder and a decoder"),
        ({"model_type": "nonsense"}, r"transformers 5\S+ does not know this type"),
        ({"hidden_act": "nonsense"}, "no usable causal language model: .*nonsense"),
    ],
    ids=str,
)
def test_a_configuration_that_cannot_be_is_explained_in_whole_sentences(
    change: dict[str, Any], sentence: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder = _copy(tiny_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ConfigInvalid, match=sentence):
        inspect_base_model(ModelFiles(folder, None), _spec(folder))
