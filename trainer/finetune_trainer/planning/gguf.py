"""What is known to become a GGUF file, by config.json alone, so that a plan can say it. Importable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class GgufType:
    """How llama.cpp takes models of one type.

    Attributes:
        architecture: What it calls them.
        interleaved: Whether it takes the two halves of a rotated pair side by side, where transformers splits them.
        norm_plus_one: Whether the checkpoint's norms lack the one that is added when they are applied.
    """

    architecture: str
    interleaved: bool = False
    norm_plus_one: bool = False


#: By model_type. Another type needs an entry, its keys in publishing/gguf/metadata.py, and a case in its test.
GGUF_TYPES: Final[Mapping[str, GgufType]] = {
    "llama": GgufType("llama", interleaved=True),
    "mistral": GgufType("llama", interleaved=True),
    "qwen2": GgufType("qwen2"),
    "qwen3": GgufType("qwen3"),
    "gemma2": GgufType("gemma2", norm_plus_one=True),
    "gemma3_text": GgufType("gemma3", norm_plus_one=True),
}
#: How positions are rotated there, too.
_ROPE_TYPES: Final = ("default", "linear", "llama3")
#: The layers of the one size of each type that scales attention by the width of a layer's input.
_SCALED_BY_WIDTH: Final = {"gemma2": 46, "gemma3_text": 62}


def gguf_problem(config: Mapping[str, Any], longest: int) -> str:
    """Return why a model with this config.json cannot become a GGUF file that computes the same; '' if it can.

    Args:
        config: config.json.
        longest: Tokens of the longest rows (training.maxLength).
    """
    kind = str(config.get("model_type"))
    if kind not in GGUF_TYPES:
        return f"models of type {kind} are not converted to GGUF; types that are: {', '.join(GGUF_TYPES)}"
    rope = _rope_types(config) - {*_ROPE_TYPES}
    if rope:
        return f"positions scaled by {min(rope)} are not converted to GGUF; {', '.join(_ROPE_TYPES)} are"
    window = config.get("sliding_window") if kind == "mistral" else None
    if config.get("use_sliding_window") or (window and longest > window):
        return f"llama.cpp has no sliding window for models of type {kind}" + (
            f": rows of up to {longest} tokens (training.maxLength) are longer than this one's of {window}"
            if window
            else ""
        )
    if kind in _SCALED_BY_WIDTH and not _scaled_as_known(kind, config):
        return "llama.cpp scales the attention of these models by the size of a head, and this one by another number"
    layers = config.get("layer_types") or ()
    if kind == "gemma3_text" and any((each == "full_attention") != (n % 6 == 5) for n, each in enumerate(layers)):
        return "llama.cpp takes every sixth layer of these models for one of full attention, and this one has others"
    return ""


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """Return the ways in which positions are scaled, as old and new configurations tell them."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    groups = [each for each in found.values() if isinstance(each, Mapping)] or [found]
    return {str(each.get("rope_type") or each.get("type") or "default") for each in groups}


def _scaled_as_known(kind: str, config: Mapping[str, Any]) -> bool:
    scale, size = config.get("query_pre_attn_scalar", 256), config.get("head_dim", 256)
    if config.get("num_hidden_layers") == _SCALED_BY_WIDTH[kind]:
        size = int(config["hidden_size"]) // int(config["num_attention_heads"])
    return bool(scale == size)
