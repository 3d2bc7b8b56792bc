"""What config.json alone says of a GGUF file."""

from typing import Any

import pytest

from finetune_trainer.planning.gguf import gguf_problem

GEMMA = {"model_type": "gemma2", "head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 26}
GEMMA3 = GEMMA | {"model_type": "gemma3_text"}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "llama"}, ""),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2}}, ""),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "llama3"}}, ""),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "yarn"}}, "positions scaled by yarn are not converted"),
        ({"model_type": "mistral", "sliding_window": 4096}, ""),
        ({"model_type": "mistral", "sliding_window": 256}, r"rows of up to 512 tokens .* than this one's of 256"),
        ({"model_type": "qwen2", "sliding_window": 256}, ""),
        ({"model_type": "qwen2", "use_sliding_window": True}, "no sliding window for models of type qwen2"),
        ({"model_type": "qwen3_moe"}, "models of type qwen3_moe are not converted to GGUF; types that are: llama, mis"),
        (GEMMA, ""),
        (GEMMA | {"query_pre_attn_scalar": 144}, "scales the attention of these models by the size of a head"),
        (
            GEMMA
            | {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "query_pre_attn_scalar": 144},
            "",
        ),
        (GEMMA | {"layer_types": ["sliding_attention", "full_attention"] * 13}, ""),
        (GEMMA | {"layer_types": ["full_attention", "sliding_attention"] * 13}, "takes one layer in 2 of these models"),
        (GEMMA | {"attn_logit_softcapping": None}, "caps the attention and the logits of these models, and this one"),
        (GEMMA | {"final_logit_softcapping": None}, "caps the attention and the logits of these models, and this one"),
        (GEMMA | {"tie_word_embeddings": False}, "takes the embeddings of these models for their head"),
        (GEMMA | {"use_bidirectional_attention": True}, "lets no token of these models see a later one"),
        (GEMMA | {"hidden_activation": "gelu"}, "computes models of type gemma2 with gelu_pytorch_tanh, and this one"),
        (GEMMA | {"hidden_act": "gelu"}, ""),  # transformers reads hidden_activation
        (
            GEMMA | {"attention_bias": True},
            "has no place for the biases of this model's attention in models of type gemma2",
        ),
        (GEMMA3, ""),
        (GEMMA3 | {"layer_types": ["full_attention"] * 2}, "takes one layer in 6 of these models for one of full"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "does not cap the attention of these models"),
        (GEMMA3 | {"final_logit_softcapping": 30.0}, ""),
        (GEMMA3 | {"rope_local_base_freq": 10000.0}, ""),
        (GEMMA3 | {"rope_local_base_freq": 20000.0}, "layers with a window by 10000, unscaled, and this one"),
        (
            GEMMA3
            | {
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                }
            },
            "",
        ),
        (
            GEMMA3
            | {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}},
            "layers with a window by 10000, unscaled, and this one",
        ),
        ({"model_type": "llama", "attention_bias": True, "hidden_act": "swish"}, ""),
        (
            {"model_type": "llama", "hidden_act": "gelu"},
            "computes models of type llama with silu, and this one has gelu",
        ),
        ({"model_type": "qwen3", "attention_bias": True}, "has no place for the biases of this model's attention"),
        *(
            (
                {"model_type": kind},
                f"^models of type {kind} are not converted to GGUF; types that are: llama, mistral, ",
            )
            for kind in ("gemma", "phi3", "mixtral", "qwen2_moe", "olmoe", "gpt_oss", "llama4_text")
        ),
    ],
)
def test_a_model_is_refused_for_what_llama_cpp_computes_otherwise(config: dict[str, Any], problem: str) -> None:
    import re

    found = gguf_problem(config, longest=512)
    assert re.search(problem, found) if problem else not found
