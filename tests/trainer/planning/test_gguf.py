"""What config.json alone says of a GGUF file."""

from typing import Any

import pytest

from finetune_trainer.planning.gguf import gguf_problem

GEMMA = {"model_type": "gemma2", "head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 26}


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
        (GEMMA | {"model_type": "gemma3_text", "layer_types": ["full_attention"] * 2}, "every sixth layer"),
    ],
)
def test_a_model_is_refused_for_what_llama_cpp_computes_otherwise(config: dict[str, Any], problem: str) -> None:
    import re

    found = gguf_problem(config, longest=512)
    assert re.search(problem, found) if problem else not found
