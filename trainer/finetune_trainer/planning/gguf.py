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
        activation: Of the feed-forward layers.
        takes_biases: Whether it has a place for attention_bias, the biases of all four projections.
    """

    architecture: str
    interleaved: bool = False
    norm_plus_one: bool = False
    activation: str = "silu"
    takes_biases: bool = False


#: By model_type. Another type needs an entry, its keys in publishing/gguf/metadata.py, and a case in its test.
GGUF_TYPES: Final[Mapping[str, GgufType]] = {
    "llama": GgufType("llama", interleaved=True, takes_biases=True),
    "mistral": GgufType("llama", interleaved=True, takes_biases=True),
    "qwen2": GgufType("qwen2"),
    "qwen3": GgufType("qwen3"),
    "gemma2": GgufType("gemma2", norm_plus_one=True, activation="gelu_pytorch_tanh"),
    "gemma3_text": GgufType("gemma3", norm_plus_one=True, activation="gelu_pytorch_tanh"),
}
#: How positions are rotated there, too.
_ROPE_TYPES: Final = ("default", "linear", "llama3")
#: The layers of the one size of each type that scales attention by the width of a layer's input.
_SCALED_BY_WIDTH: Final = {"gemma2": 46, "gemma3_text": 62}
#: Of this many layers the last one has full attention there, the others a window.
_FULL_EVERY: Final = {"gemma2": 2, "gemma3_text": 6}
#: What it rotates the positions of layers with a window by, where a type has a base of their own.
_WINDOW_BASE: Final = 10_000


def gguf_problem(config: Mapping[str, Any], longest: int) -> str:
    """Return why a model with this config.json cannot become a GGUF file that computes the same; '' if it can.

    Args:
        config: config.json.
        longest: Tokens of the longest rows (training.maxLength).
    """
    kind = str(config.get("model_type"))
    if kind not in GGUF_TYPES:
        return f"models of type {kind} are not converted to GGUF; types that are: {', '.join(GGUF_TYPES)}"
    return (
        _rotation_problem(kind, config)
        or _window_problem(kind, config, longest)
        or _form_problem(kind, config)
        or _gemma_problem(kind, config)
    )


def _rotation_problem(kind: str, config: Mapping[str, Any]) -> str:
    groups = _rotations(config)
    rope = {str(each.get("rope_type") or each.get("type") or "default") for each in groups.values()} - {*_ROPE_TYPES}
    if rope:
        return f"positions scaled by {min(rope)} are not converted to GGUF; {', '.join(_ROPE_TYPES)} are"
    local = groups.get("sliding_attention", {})
    base = local.get("rope_theta", config.get("rope_local_base_freq", _WINDOW_BASE))
    if kind == "gemma3_text" and (base != _WINDOW_BASE or local.get("rope_type", "default") != "default"):
        return (
            f"llama.cpp rotates positions in these models' layers with a window by {_WINDOW_BASE}, unscaled, and this"
            " one by something else"
        )
    return ""


def _rotations(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return how positions are rotated, by the kind of layers, as old and new configurations tell it."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    groups = {key: each for key, each in found.items() if isinstance(each, Mapping)}
    return groups or {"": found}


def _window_problem(kind: str, config: Mapping[str, Any], longest: int) -> str:
    window = config.get("sliding_window") if kind == "mistral" else None
    if not config.get("use_sliding_window") and not (window and longest > window):
        return ""
    rows = f": rows of up to {longest} tokens (training.maxLength) are longer than this one's of {window}"
    return f"llama.cpp has no sliding window for models of type {kind}{rows if window else ''}"


def _form_problem(kind: str, config: Mapping[str, Any]) -> str:
    known = GGUF_TYPES[kind]
    activation = config.get("hidden_activation" if kind in _FULL_EVERY else "hidden_act") or known.activation
    if activation.replace("swish", "silu") != known.activation:
        return f"llama.cpp computes models of type {kind} with {known.activation}, and this one has {activation}"
    if config.get("attention_bias") and not known.takes_biases:
        return f"llama.cpp has no place for the biases of this model's attention in models of type {kind}"
    return ""


def _gemma_problem(kind: str, config: Mapping[str, Any]) -> str:
    if kind not in _FULL_EVERY:
        return ""
    scale, size = config.get("query_pre_attn_scalar", 256), config.get("head_dim", 256)
    if config.get("num_hidden_layers") == _SCALED_BY_WIDTH[kind]:
        size = int(config["hidden_size"]) // int(config["num_attention_heads"])
    if scale != size:
        return "llama.cpp scales the attention of these models by the size of a head, and this one by another number"
    every = _FULL_EVERY[kind]
    layers = config.get("layer_types") or ()
    if any((each == "full_attention") != (n % every == every - 1) for n, each in enumerate(layers)):
        return (
            f"llama.cpp takes one layer in {every} of these models for one of full attention, and this one has others"
        )
    attention, final = config.get("attn_logit_softcapping", 50), config.get("final_logit_softcapping", 30)
    if kind == "gemma2" and not (attention and final):
        return "llama.cpp caps the attention and the logits of these models, and this one does not"
    if kind == "gemma3_text" and config.get("attn_logit_softcapping"):
        return "llama.cpp does not cap the attention of these models, and this one does"
    if config.get("use_bidirectional_attention"):
        return "llama.cpp lets no token of these models see a later one, and this one does"
    if kind == "gemma2" and not config.get("tie_word_embeddings", True):
        return "llama.cpp takes the embeddings of these models for their head, and this one has a head of its own"
    return ""
