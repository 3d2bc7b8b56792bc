"""How many weights a model has, by its config.json: a table of what families differ in. Pure, importable without torch.

A trainer counts its model itself, on torch's meta device; tests hold this table against that.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Counts:
    """Weights of a model.

    Attributes:
        linear: Of linear layers without the head: bitsandbytes quantizes these.
        experts: Of experts that are one parameter of three dimensions: they are quantized to 4 bits alone.
        other: All others: embeddings, head, norms, biases.
    """

    linear: int
    experts: int
    other: int

    @property
    def total(self) -> int:
        return self.linear + self.experts + self.other


@dataclass(frozen=True)
class Family:
    """What a family of dense decoders differs in.

    A text stands for the setting of config.json by that name.

    Attributes:
        gated: Whether the MLP has three matrices (gate, up, down) rather than two.
        qkv_bias: Whether the query, key and value projections have biases.
        o_bias: Whether the output projection has.
        mlp_bias: Whether the MLP has.
        norms: Norms of the width of the model in each layer.
        norm_vectors: Vectors of a norm: a weight, and a bias if two; none if 0.
        qk_norm: "head" for norms of each head of queries and keys, "full" for norms of all of them together.
        final_norm: Whether a norm follows the last layer.
        embedding_norm: Whether a norm follows the embeddings.
        positions: Rows of a table of positions beyond max_position_embeddings; None for no table.
        tied: Whether the head is the table of embeddings where config.json does not say.
        head_bias: Whether the head has a bias.
        activation: Weights of a layer's activation function.
        multi_query: Whether there is one key and value head unless told otherwise.
    """

    gated: bool = True
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    norms: int = 2
    norm_vectors: int = 1
    qk_norm: str = ""
    final_norm: bool = True
    embedding_norm: bool = False
    positions: int | None = None
    tied: bool = False
    head_bias: bool | str = False
    activation: int = 0
    multi_query: bool = False


_ATTENTION_BIAS: Final[dict[str, Any]] = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_LLAMA: Final = Family(**_ATTENTION_BIAS, mlp_bias="mlp_bias")
_PLAIN: Final = Family(gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, norm_vectors=2)
_QWEN3: Final = Family(**_ATTENTION_BIAS, qk_norm="head")
#: Families by model_type. Those with experts have them in `_experts`, too.
FAMILIES: Final[Mapping[str, Family]] = {
    "llama": _LLAMA,
    "internlm3": _LLAMA,
    "mistral": Family(),
    "ministral": Family(),
    "ministral3": Family(),
    "mixtral": Family(),
    "arcee": Family(gated=False, **_ATTENTION_BIAS, mlp_bias="mlp_bias"),
    "apertus": Family(gated=False, **_ATTENTION_BIAS, qk_norm="head", activation=2),
    "bloom": Family(
        gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, norm_vectors=2, embedding_norm=True, tied=True
    ),
    "codegen": Family(gated=False, mlp_bias=True, norms=1, norm_vectors=2, head_bias=True),
    "cohere": Family(**_ATTENTION_BIAS, norms=1, tied=True),
    "cohere2": Family(**_ATTENTION_BIAS, norms=1, tied=True),
    "ernie4_5": Family(qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", tied=True),
    "exaone4": Family(qk_norm="head"),
    "gemma": Family(**_ATTENTION_BIAS, tied=True),
    "gemma2": Family(**_ATTENTION_BIAS, norms=4, tied=True),
    "gemma3_text": Family(**_ATTENTION_BIAS, norms=4, qk_norm="head", tied=True),
    "vaultgemma": Family(**_ATTENTION_BIAS, norms=2, tied=True),
    "glm": Family(qkv_bias="attention_bias"),
    "glm4": Family(qkv_bias="attention_bias", norms=4),
    "gpt2": Family(gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, norm_vectors=2, positions=0, tied=True),
    "gpt_bigcode": Family(
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        norm_vectors=2,
        positions=0,
        tied=True,
        multi_query=True,
    ),
    "gpt_neox": Family(gated=False, qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias=True, norm_vectors=2),
    "gptj": Family(gated=False, mlp_bias=True, norms=1, norm_vectors=2, head_bias=True),
    "granite": _LLAMA,
    "helium": Family(qkv_bias="attention_bias"),
    "hunyuan_v1_dense": Family(**_ATTENTION_BIAS, qk_norm="head"),
    "nemotron": Family(gated=False, **_ATTENTION_BIAS, mlp_bias="mlp_bias", norm_vectors=2),
    "olmo": Family(**_ATTENTION_BIAS, norm_vectors=0),
    "olmo2": Family(**_ATTENTION_BIAS, qk_norm="full"),
    "olmo3": Family(**_ATTENTION_BIAS, qk_norm="full"),
    "olmoe": Family(**_ATTENTION_BIAS, qk_norm="full"),
    "opt": Family(gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, norm_vectors=2, positions=2, tied=True),
    "persimmon": Family(gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, norm_vectors=2, qk_norm="head2"),
    "phi": Family(gated=False, qkv_bias=True, o_bias=True, mlp_bias=True, norms=1, norm_vectors=2, head_bias=True),
    "phi3": Family(),
    "phimoe": Family(**_ATTENTION_BIAS, norm_vectors=2, head_bias="lm_head_bias"),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias="qkv_bias"),
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3,
    "gpt_oss": Family(**_ATTENTION_BIAS),
    "granitemoe": Family(**_ATTENTION_BIAS),
    "seed_oss": Family(qkv_bias="attention_bias", o_bias="attention_out_bias", mlp_bias="mlp_bias"),
    "smollm3": Family(**_ATTENTION_BIAS, mlp_bias="mlp_bias", tied=True),
    "stablelm": Family(qkv_bias="use_qkv_bias", norm_vectors=2),
    "starcoder2": Family(
        gated=False, qkv_bias="use_bias", o_bias="use_bias", mlp_bias="use_bias", norm_vectors=2, tied=True
    ),
}
#: Settings that config.json may leave out, where transformers takes them as true.
_TRUE: Final = {
    ("gpt_neox", "attention_bias"), ("starcoder2", "use_bias"), ("seed_oss", "attention_bias"),
    ("qwen2_moe", "qkv_bias"), ("gpt_oss", "attention_bias"), ("glm", "attention_bias"),
}  # fmt: skip


#: Types with experts as wide as intermediate_size says.
_WHOLE_WIDTH: Final = ("mixtral", "phimoe", "olmoe", "gpt_oss", "granitemoe")


def count(config: Mapping[str, Any]) -> Counts | None:
    """Return the weights of the model of config.json, None for a type that the table does not hold."""
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or config.get("alternating_layers"):
        return None
    try:
        return _count(config, family)
    except (KeyError, TypeError, ValueError):
        return None


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether the head is the table of embeddings, by config.json or by what its family does."""
    family = FAMILIES.get(str(config.get("model_type")), Family())
    return bool(config.get("tie_word_embeddings", family.tied))


def with_new_tokens(config: Mapping[str, Any], tokens: int) -> Mapping[str, Any]:
    """Return config.json of the model once it has `tokens` more embeddings (spec.dataset.addTokens)."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        return {**config, "text_config": with_new_tokens(inner, tokens)}
    size = config.get("vocab_size")
    return {**config, "vocab_size": size + tokens} if isinstance(size, int) else config


def _count(config: Mapping[str, Any], family: Family) -> Counts:
    kind = str(config["model_type"])
    hidden, heads = first(config, "hidden_size", "n_embd"), first(config, "num_attention_heads", "n_head")
    layers = first(config, "num_hidden_layers", "n_layer")
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = _kv_heads(config, family, heads)
    inner = config.get("intermediate_size") or config.get("ffn_dim") or config.get("n_inner") or 4 * hidden

    def asked(setting: bool | str) -> bool:
        return setting if isinstance(setting, bool) else bool(config.get(setting, (kind, setting) in _TRUE))

    queries, keys = heads * head_dim, kv_heads * head_dim
    linear = hidden * (queries + 2 * keys) + queries * hidden
    other = (queries + 2 * keys) * asked(family.qkv_bias) + hidden * asked(family.o_bias)
    other += family.activation + family.norms * family.norm_vectors * hidden
    other += {"": 0, "head": 2 * head_dim, "head2": 4 * head_dim, "full": queries + keys}[family.qk_norm]
    matrices = 3 if family.gated else 2
    dense = matrices * hidden * inner
    dense_bias = ((matrices - 1) * inner + hidden) * asked(family.mlp_bias)
    routed = _experts(config, kind, hidden, inner)
    experts = 0
    if routed is None:
        linear, other = linear + dense, other + dense_bias
    else:
        linear, other, experts = linear + routed.linear, other + routed.other, routed.experts
    vocabulary = config["vocab_size"]
    embeddings = vocabulary * hidden * (1 if is_tied(config) else 2)
    embeddings += vocabulary * asked(family.head_bias) + hidden * family.norm_vectors * (
        family.final_norm + family.embedding_norm
    )
    if family.positions is not None:
        embeddings += (first(config, "max_position_embeddings", "n_positions") + family.positions) * hidden
    return Counts(layers * linear, layers * experts, layers * other + embeddings)


def first(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of these settings that is given and not 0. Raises KeyError if none is."""
    found = next((config[name] for name in names if config.get(name)), None)
    if found is None:
        raise KeyError(names[0])
    return int(found)


def _kv_heads(config: Mapping[str, Any], family: Family, heads: int) -> int:
    if family.multi_query:
        return 1 if config.get("multi_query", True) else heads
    return int(config.get("num_key_value_heads") or heads)


def _experts(config: Mapping[str, Any], kind: str, hidden: int, inner: int) -> Counts | None:
    """Return the weights of one layer's experts and their router, None where the layer is dense."""
    count = config.get("num_local_experts") or config.get("num_experts")
    if not count:
        return None
    width = inner if kind in _WHOLE_WIDTH else config["moe_intermediate_size"]
    experts, linear, other = count * 3 * hidden * width, 0, count * hidden
    if kind == "gpt_oss":
        other += count * (2 * width + hidden + 1) + config["num_attention_heads"]  # biases, and a sink for each head
    if kind == "qwen2_moe":
        linear += 3 * hidden * config["shared_expert_intermediate_size"] + hidden
    return Counts(linear, experts, other)
