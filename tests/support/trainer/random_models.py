"""Small models of many families with random weights and adapters, and random prompts for them."""

import random
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "sliding_window": None,
    "pad_token_id": None,
}
TARGETS = {"mamba": ["x_proj"]}


def build(family: str, **more: Any) -> Any:
    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | more))
    for parameter in base.parameters():  # away from ties
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 1.0)
    layers = TARGETS.get(family, "all-linear")
    wanted = LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, target_modules=layers)
    return get_peft_model(base, wanted).eval()


def prompts(count: int) -> list[list[int]]:
    noise = random.Random(1)
    return [[noise.randrange(4, 400) for _ in range(noise.randint(3, 40))] for _ in range(count)]
