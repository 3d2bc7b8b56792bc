"""A merged model computes what the adapter on its base computes, whatever the family, the quantization, the adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model.base import BaseModel, inspect_base_model
from finetune_trainer.publishing import merging
from finetune_trainer.publishing.export import check_exports
from finetune_trainer.publishing.merging import CannotMerge, Merger, write_shards
from support.trainer.adapted import adapted_spec as spec
from support.trainer.adapted import family, logits, trained


def merged_logits(folder: Path, base: BaseModel) -> torch.Tensor:
    from transformers import AutoConfig

    from finetune_trainer.model.architecture import model_class

    config = AutoConfig.from_pretrained(folder)
    return logits(model_class(config).from_pretrained(folder, dtype=torch.float32).eval())


@pytest.mark.parametrize(
    ("kind", "sections"),
    [
        ("llama", {}),
        ("llama", {"quantization": {"bits": 4}}),
        ("llama", {"quantization": {"bits": 4, "type": "fp4", "doubleQuant": False}}),
        ("llama", {"quantization": {"bits": 8}}),
        ("llama", {"lora": {"targetModules": ["all-linear"], "rslora": True, "alpha": 3}}),
        ("llama", {"lora": {"dora": True}, "quantization": {"bits": 4}}),
        ("llama", {"lora": {"modulesToSave": ["lm_head"]}}),
        ("llama", {"lora": {"embeddings": True}, "quantization": {"bits": 4}}),
        ("qwen2", {"lora": {"bias": "all"}}),
        ("gemma2", {"lora": {"targetModules": ["q_proj", "down_proj"], "layersToTransform": [1]}}),
        ("gpt2", {"lora": {"targetModules": ["c_attn", "c_proj"]}}),
        ("gpt2", {"lora": {"targetModules": ["c_attn"], "dora": True}}),
        ("phi3", {"lora": {"targetModules": ["qkv_proj", "gate_up_proj"]}}),
    ],
)
def test_the_merged_model_computes_the_same(
    kind: str, sections: dict[str, Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = family(kind, tiny_model, tmp_path / "base")
    wanted = spec(source, **sections)
    model, base = trained(source, wanted, tmp_path / "adapter")
    monkeypatch.setattr(merging, "SHARD_BYTES", 40_000)
    out = tmp_path / "merged"
    out.mkdir()
    size = write_shards(Merger(source, tmp_path / "adapter", base, wanted), out)
    base.config.save_pretrained(out)
    index = json.loads((out / merging.INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == size
    weights = [each for file in sorted(set(index["weight_map"].values())) for each in load_file(out / file).values()]
    assert {each.dtype for each in weights if each.is_floating_point()} == {torch.bfloat16}
    expected, found = logits(model), merged_logits(out, base)
    with model.disable_adapter():
        change = (logits(model) - expected).abs().max()
    difference = (found - expected).abs().max()
    # LLM.int8 rounds the activations too, which a merged model does not.
    assert difference < (0.2 if wanted.quantization.bits == 8 else 0.05) * change


def test_one_file_is_enough_for_a_small_model(tiny_model: Path, tmp_path: Path) -> None:
    wanted = spec(tiny_model)
    _, base = trained(tiny_model, wanted, tmp_path)
    write_shards(Merger(tiny_model, tmp_path, base, wanted), tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / merging.INDEX_FILE).exists()


def test_what_cannot_be_merged_is_refused_before_training(tiny_model: Path, tmp_path: Path) -> None:
    source = family("qwen3_moe", tiny_model, tmp_path / "experts")
    wanted = spec(source, lora={"targetModules": ["down_proj"], "dropout": 0})
    base = inspect_base_model(ModelFiles(source, None), wanted)
    with pytest.raises(CannotMerge, match=r"models of type qwen3_moe store these weights in another form"):
        merging.check_mergeable(source, base, wanted)
    with pytest.raises(Exception, match=r"^spec\.output\.artifacts: merged: the adapter changes "):
        check_exports(source, base, wanted)
    with pytest.raises(CannotMerge, match=r"the experts were trained in 4 bits"):
        merging.check_mergeable(source, base, spec(source, quantization={"bits": 4}))
    check_exports(source, base, spec(source, output={"uri": "file:///out"}))


def test_a_base_stored_in_4_bits_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from finetune_trainer.model.weights import quantization_config

    wanted = spec(tiny_model, quantization={"bits": 4})
    packed = tmp_path / "packed"
    AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization_config(wanted)).save_pretrained(
        packed
    )
    for file in tiny_model.glob("tokenizer*"):
        shutil.copy(file, packed)
    wanted = spec(packed, quantization={"bits": 4})
    base = inspect_base_model(ModelFiles(packed, None), wanted)
    with pytest.raises(ConfigInvalid, match=r"^spec\.output\.artifacts: merged: the weights of .* in 4 bits: take"):
        check_exports(packed, base, wanted)


def test_an_adapter_with_tokens_of_its_own_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    rows = {"train": "file:///x.jsonl", "addTokens": ["<thought>"]}
    wanted = spec(tiny_model, dataset=rows, lora={"embeddings": True})
    base = inspect_base_model(ModelFiles(tiny_model, None), wanted)
    with pytest.raises(ConfigInvalid, match=r"^spec\.output\.artifacts: merged: .*its own \(dataset\.addTokens\)"):
        check_exports(tiny_model, base, wanted)


def test_a_model_with_code_of_its_own_is_refused(tiny_model: Path) -> None:
    model = {"source": f"file://{tiny_model}", "trustRemoteCode": True, "revision": "a" * 40}
    wanted = spec(tiny_model, model=model)
    base = inspect_base_model(ModelFiles(tiny_model, None), wanted)
    with pytest.raises(ConfigInvalid, match=r"^spec\.output\.artifacts: merged: a model with code of its own"):
        check_exports(tiny_model, base, wanted)


def test_a_part_of_the_adapter_that_has_no_place_is_never_left_out(tiny_model: Path, tmp_path: Path) -> None:
    wanted = spec(tiny_model)
    _, base = trained(tiny_model, wanted, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.extra.lora_A.weight": torch.ones(2, 2)}, file)
    with pytest.raises(CannotMerge, match=r"the adapter holds base_model\.model\.extra\.lora_A\.weight, for which"):
        write_shards(Merger(tiny_model, tmp_path, base, wanted), tmp_path)
