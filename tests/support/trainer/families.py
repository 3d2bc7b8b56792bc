"""Tiny random models of every causal language model type that transformers has: width 64, two layers, milliseconds.

Configurations are the types' own defaults with every size made small, so nothing here names how a family computes.
"""

from typing import Any, Final

VOCABULARY: Final = 128
#: Sizes by the names that configurations give them.
_SMALL: Final[dict[str, Any]] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "ffn_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim", "d_ff"), 96),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "encoder_max"), 256),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_key_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "d_kv", "index_head_dim"), 16),
    **dict.fromkeys(("head_dim", "attention_head_dim", "mamba_d_state", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("ssm_state_size", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "n_words"), VOCABULARY),
    **dict.fromkeys(("depth", "embed_dim_layers"), 2),
    "hidden_size_per_layer_input": 16,
    "embed_dim": 64,
    "emb_dim": 64,
    "encoder_attention_heads": 4,
    "linear_num_value_heads": 4,
    "sliding_window": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Lists with an entry for each layer: the type makes them anew.
_BY_LAYER: Final = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types")
_LAYERS: Final = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
_PARTS: Final = ("text_config", "vision_config", "audio_config", "decoder")
_ENCODERS: Final = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
_LATENT: Final = (
    "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite",
    "glm_moe_dsa", "kimi_linear", "longcat_flash", "minicpm3", "youtu",
)  # fmt: skip
_MROPE: Final = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_EXPERIMENTAL: Final = ("qwen4_exp", "qwen4_exp_text")
_QWEN4_EXP: Final = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
    "indexer_compress_ratio": 4, "hc_lowrank": 16, "num_experts_per_tok": 2,
}  # fmt: skip
#: What a type wants besides, or otherwise.
_MORE: Final[dict[str, dict[str, Any]]] = {
    **{kind: {"text_config": _QWEN4_EXP} if kind == "qwen4_exp" else _QWEN4_EXP for kind in _EXPERIMENTAL},
    **{kind: {"is_decoder": True} for kind in _ENCODERS},
    **{kind: {"head_dim": 8, "num_key_value_heads": 4} for kind in _LATENT},
    **{kind: {"text_config": {"rope_parameters": _MROPE}} for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    "bailing_hybrid": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "num_local_experts": 4,
        "num_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
    },
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cpmant": {"dim_head": 16},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8}, "ffn_config": {"hidden_size": 64}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16},
    "dots3_note_text": {
        "head_dim": 8,
        "num_key_value_heads": 4,
        "shared_experts_intermediate_size": 32,
        **{f"swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")},
        "swa_head_dim": 24,
    },
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
        "mlp_layer_types": ["dense", "sparse"],
        "num_experts_per_tok": 2,
        "per_layer_config": {},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 32},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"head_dim": 8, "num_key_value_heads": 4, "num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "num_hidden_layers": 3, "lru_width": 64},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 16]},
    "roc_bert": {"is_decoder": True, "shape_vocab_size": 128, "pronunciation_vocab_size": 128},
    "zamba": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
#: Multimodal types that are no causal language models to transformers, but hold one.
MULTIMODAL: Final = ("llava", "mistral3", "paligemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
#: One of each kind, by what is special about it.
KINDS: Final = {
    "dense": "llama",
    "biases": "qwen2",
    "soft caps": "gemma2",
    "Conv1D": "gpt2",
    "fused projections": "phi3",
    "ALiBi": "bloom",
    "learned positions": "opt",
    "multi-query": "falcon",
    "mixture of experts": "qwen3_moe",
    "experts, fused": "mixtral",
    "sinks": "gpt_oss",
    "latent attention": "deepseek_v3",
    "state space": "mamba",
    "hybrid": "falcon_h1",
    "convolution": "lfm2",
    "linear attention": "qwen3_next",
    "recurrence": "recurrent_gemma",
    "another head": "modernbert-decoder",
    "no body": "llama4",
    "an encoder as decoder": "bert",
    "multimodal": "gemma3",
    "vision and language": "qwen2_vl",
}


def causal_types() -> list[str]:
    """Return every type that transformers calls a causal language model, and the multimodal ones that hold one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL})


def tiny_config(kind: str, **changes: Any) -> Any:
    """Return a small configuration of the type `kind`. Raises whatever its class does where none can be."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    factory = CONFIG_MAPPING[kind]
    defaults = factory(**_MORE.get(kind, {}) if kind in ("xmod",) else {})
    sizes = _small(defaults.to_dict())
    for part in _PARTS:
        inner = getattr(defaults, part, None)
        if inner is not None and not isinstance(inner, dict):
            sizes[part] = _small(inner.to_dict()) | _MORE.get(inner.model_type, {}) | {"model_type": inner.model_type}
    for name, value in (_MORE.get(kind, {}) | changes).items():
        sizes[name] = sizes[name] | value if name in _PARTS else value
    return factory(**sizes)


def _small(defaults: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in _SMALL.items() if name in defaults}
    for name in _BY_LAYER:
        if defaults.get(name):  # a layer of each kind
            kinds = list(dict.fromkeys(defaults[name]))
            found[name] = (kinds * 2)[: max(2, len(kinds))]
            found |= {each: len(found[name]) for each in _LAYERS if each in defaults}
    return found


def tiny_model(kind: str, **changes: Any) -> Any:
    """Return a random model of the type `kind`, as the class that the trainer loads it as."""
    import torch

    from finetune_trainer.model.architecture import model_class

    torch.manual_seed(0)
    config = tiny_config(kind, **changes)
    model = model_class(config).from_config(config)
    for each in model.parameters():  # what begins as zeros would hide whatever it is multiplied with, or added to
        if not each.is_meta and not each.any():
            torch.nn.init.normal_(each, std=0.05)
    return model
