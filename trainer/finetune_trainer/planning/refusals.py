"""What a trainer refuses by config.json alone, so that a plan can say it ahead. Pure, importable without torch."""

from collections.abc import Mapping
from typing import Any, Final

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.planning.gguf import gguf_problem

_GATED: Final = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
_PLAIN: Final = "down_proj k_proj o_proj q_proj up_proj v_proj"
_FUSED: Final = "dense dense_4h_to_h dense_h_to_4h query_key_value"
#: The linear layers of dense types, where the names do not depend on more than the type.
LAYERS: Final[Mapping[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite"), _GATED),
    **dict.fromkeys(("cohere", "cohere2", "olmo", "olmo2", "olmo3", "smollm3", "stablelm", "seed_oss"), _GATED),
    **dict.fromkeys(("arcee", "apertus", "nemotron"), _PLAIN),
    **dict.fromkeys(("bloom", "gpt_neox", "persimmon"), _FUSED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), "c_attn c_fc c_proj"),
    "opt": "fc1 fc2 k_proj out_proj q_proj v_proj",
    "phi": "dense fc1 fc2 k_proj q_proj v_proj",
    "phi3": "down_proj gate_up_proj o_proj qkv_proj",
    "starcoder2": "c_fc c_proj k_proj o_proj q_proj v_proj",
}
#: Types whose code does with linear layers what bitsandbytes' cannot take: bits that are refused, and why.
_NOT_QUANTIZED: Final[Mapping[str, tuple[tuple[int, ...], str]]] = {
    "falcon": ((8,), "their code changes in place what linear layers answer, and LLM.int8's cannot be changed"),
    "roc_bert": ((4, 8), "their code changes in place what linear layers answer"),
    "rwkv": ((4, 8), "their code rescales the weights of linear layers"),
}


def check_config(config: Mapping[str, Any], spec: FineTuneJobSpec) -> None:
    """Check stored quantization, the number of positions and the names of layers against the spec.

    Args:
        config: config.json.
        spec: The job's spec.

    Raises:
        ConfigInvalid: For weights that are quantized in a way that cannot be trained on, or have other bits than the
            spec asks for; for a model that is too short for training.maxLength, or lacks a target module.
    """
    stored_quantization(config, spec)
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings")
    if positions and spec.training.max_length > positions:
        raise ConfigInvalid(
            f"spec.training.maxLength: {spec.training.max_length} is more than the {positions} positions of"
            f" {spec.model.source}"
        )
    kind = str(config.get("model_type"))
    refused, reason = _NOT_QUANTIZED.get(kind, ((), ""))
    if (bits := spec.quantization.bits) in refused:
        others = " or ".join(str(each) for each in (4, 8, 16) if each not in refused)
        raise ConfigInvalid(
            f"spec.quantization.bits: {bits}, but models of type {kind} train in {others} bits only: {reason}"
        )
    _check_names(kind, spec)
    if "gguf" in spec.output.artifacts and (problem := gguf_problem(config, spec.training.max_length)):
        raise ConfigInvalid(f"spec.output.artifacts: gguf: {problem}")


def _check_names(kind: str, spec: FineTuneJobSpec) -> None:
    known, lora = LAYERS.get(kind, "").split(), spec.lora
    if not known or lora.target_pattern or "all-linear" in lora.target_modules:
        return
    for name in lora.target_modules:
        if name.rpartition(".")[2] not in known:
            raise ConfigInvalid(
                f"spec.lora.targetModules: {name!r} is no linear layer of this model; it has {', '.join(known)}"
                " (or all-linear)"
            )


def stored_quantization(config: Mapping[str, Any], spec: FineTuneJobSpec) -> dict[str, Any]:
    """Return how the weights are stored if they are quantized already, {} if they are not.

    Raises:
        ConfigInvalid: For all but bitsandbytes' 4 bits, and where the spec asks for other bits.
    """
    found = dict(config.get("quantization_config") or {})
    if not found:
        return {}
    source, method = spec.model.source, found.get("quant_method") or "an unknown method"
    if method != "bitsandbytes" or not found.get("load_in_4bit", found.get("_load_in_4bit")):
        kind = f"{method} in 8 bits" if method == "bitsandbytes" else method
        raise ConfigInvalid(
            f"spec.model.source: {source} is quantized already, with {kind}; take the original weights, or those of"
            " bitsandbytes in 4 bits"
        )
    if spec.quantization.bits != 4:
        raise ConfigInvalid(
            f"spec.quantization.bits: {spec.quantization.bits}, but the weights of {source} are stored in 4 bits; set 4"
        )
    return found
