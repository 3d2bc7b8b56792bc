"""A merged model computes what the adapter on its base computes, whatever the family, the quantization, the adapter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model import adapter
from finetune_trainer.model.base import BaseModel, inspect_base_model
from finetune_trainer.model.weights import load_base_model
from finetune_trainer.publishing import merging
from finetune_trainer.publishing.export import check_exports
from finetune_trainer.publishing.merging import CannotMerge, Merger, write_shards
from support.trainer.families import tiny_model as tiny_family

IDS = torch.arange(5, 45)[None]


def spec(source: Path, **sections: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{source}"},
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out", "artifacts": ["merged"]},
            "training": {"maxLength": 64, "precision": "fp32"},
            "quantization": {"bits": 16, "computeDtype": "float32"},
        }
        | sections
    )


def family(kind: str, tokenizer: Path, folder: Path) -> Path:
    """A model of the family `kind`, in files, with the tokenizer of the tiny model."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    tiny_family(kind, vocab_size=len(words)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def trained(source: Path, wanted: FineTuneJobSpec, folder: Path) -> tuple[Any, BaseModel]:
    """A PEFT model whose adapter does something, saved to `folder`."""
    base = inspect_base_model(ModelFiles(source, None), wanted)
    torch.manual_seed(0)
    loaded = load_base_model(source, base, wanted, ExecutionPlan(attention=base.attention), "cpu")
    model = adapter.attach_adapter(loaded, base, wanted.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapter.save_adapter(model, folder)
    return model.eval(), base


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits.float()
    return found


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


def test_a_part_of_the_adapter_that_has_no_place_is_never_left_out(tiny_model: Path, tmp_path: Path) -> None:
    wanted = spec(tiny_model)
    _, base = trained(tiny_model, wanted, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.extra.lora_A.weight": torch.ones(2, 2)}, file)
    with pytest.raises(CannotMerge, match=r"the adapter holds base_model\.model\.extra\.lora_A\.weight, for which"):
        write_shards(Merger(tiny_model, tmp_path, base, wanted), tmp_path)
