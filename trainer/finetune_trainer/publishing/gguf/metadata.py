"""What a GGUF file says of a model before its weights: sizes, rotation of positions, tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from finetune_trainer.planning.gguf import GgufType
from finetune_trainer.publishing.gguf.vocabulary import Vocabulary

if TYPE_CHECKING:  # the library is asked for only where a file is made
    import gguf

#: The library's names of what a file mostly holds.
_FILE_TYPES: Final = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}


def describe(writer: gguf.GGUFWriter, config: Any, kind: GgufType, name: str, quantization: str) -> None:
    """Write the keys of a model with transformers' configuration `config`."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[quantization]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    longest, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    # llama.cpp's llama has no window: beyond it, it would compute something else.
    writer.add_context_length(min(window, longest) if window and kind.architecture == "llama" else longest)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    size = head_size(config)
    writer.add_rope_dimension_count(size)
    writer.add_key_length(size)
    writer.add_value_length(size)
    if kind.norm_plus_one:
        writer.add_sliding_window(config.sliding_window)
        if config.attn_logit_softcapping:
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)
    rope = rotation(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def describe_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary, tokenizer: Any) -> None:
    """Write the keys of the tokenizer, with its chat template."""
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.rule:
        writer.add_tokenizer_pre(vocabulary.rule)
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.adds_space)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def head_size(config: Any) -> int:
    """Return the numbers of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotation(config: Any) -> dict[str, Any]:
    """Return how positions are rotated in layers of full attention."""
    found: dict[str, Any] = config.rope_parameters
    return dict(found.get("full_attention") or found)


def frequency_factors(config: Any) -> torch.Tensor | None:
    """Return what llama.cpp divides each frequency by, for Llama 3.1's way to scale positions; None for others."""
    rope = rotation(config)
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    size = head_size(config)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors: torch.Tensor = plain / scaled.float()
    return factors
