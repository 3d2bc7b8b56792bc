"""Tiny models of many families with an adapter that does something, in files, and what they compute."""

from pathlib import Path
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from support.trainer.families import tiny_model as tiny_family


def adapted_spec(source: Path, **sections: Any) -> FineTuneJobSpec:
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


def family(kind: str, tokenizer: Path, folder: Path, **changes: Any) -> Path:
    """A model of the family `kind`, in files, with the tokenizer in another folder."""
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(tokenizer)
    tiny_family(kind, vocab_size=len(words), **changes).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def trained(source: Path, wanted: FineTuneJobSpec, folder: Path) -> tuple[Any, Any]:
    """A PEFT model whose adapter does something, saved to `folder`, and its BaseModel."""
    import torch

    from finetune_trainer.inputs import ModelFiles
    from finetune_trainer.model import adapter
    from finetune_trainer.model.base import inspect_base_model
    from finetune_trainer.model.weights import load_base_model

    base = inspect_base_model(ModelFiles(source, None), wanted)
    torch.manual_seed(0)
    loaded = load_base_model(source, base, wanted, ExecutionPlan(attention=base.attention), "cpu")
    model = adapter.attach_adapter(loaded, base, wanted.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    adapter.save_adapter(model, folder)
    return model.eval(), base


def logits(model: Any, ids: list[int] | None = None) -> Any:
    import torch

    with torch.no_grad():
        return model(input_ids=torch.tensor([ids or list(range(5, 45))]), use_cache=False).logits.float()


_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_HEADS = {"head_dim": 32, "query_pre_attn_scalar": 32}
_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
#: Types of models, and what makes a tiny one of them a model that llama.cpp knows.
GGUF_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3.1": ("llama", {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma2": ("gemma2", _HEADS),
    "gemma3": ("gemma3_text", _HEADS | {"num_hidden_layers": 6, "layer_types": _LAYERS, "sliding_window": 16}),
}


def exported_to_gguf(name: str, quantization: str, tokenizer: Path, folder: Path) -> tuple[Any, Path]:
    """One of GGUF_FAMILIES, trained and made into a file: the Trained, and the artifact's folder."""
    from finetune_trainer.publishing.artifact import Trained
    from finetune_trainer.publishing.artifacts import ARTIFACTS
    from finetune_trainer.publishing.export import check_exports

    kind, changes = GGUF_FAMILIES[name]
    source = family(kind, tokenizer, folder / "base", **changes)
    output = {"uri": "file:///out", "artifacts": ["gguf"], "gguf": {"quantization": quantization}}
    spec = adapted_spec(source, output=output)
    model, base = trained(source, spec, folder / "adapter")
    check_exports(source, base, spec)
    made = Trained(spec, model, base, ExecutionPlan(attention=base.attention), source, folder / "adapter")
    ARTIFACTS["Gguf"].build(made, folder / "made")
    return made, folder / "made"
