"""A tiny Mistral with a trained BPE tokenizer, and chain-of-thought NLI rows for it: real files, seconds to build."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NAMES = ("anna", "bruno", "clara", "dino", "erika", "fritz")
THINGS = ("bread", "apples", "books", "candles", "ropes", "tea")
ANSWER_MARKER = "[/INST]"


def nli_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` text rows: does the premise entail that the person has the thing? The answer is JSON with the label."""
    generator = random.Random(seed)
    return [{"text": _row(generator)} for _ in range(count)]


def _row(generator: random.Random) -> str:
    who, other = generator.sample(NAMES, 2)
    things = generator.sample(THINGS, generator.randint(1, 3))
    label = generator.randint(0, 1)
    asked = generator.choice(things if label else [thing for thing in THINGS if thing not in things])
    premise = f"{who} has {' and '.join(things)}, {other} watches"
    thought = f"{who} has {' and '.join(things)}"
    answer = json.dumps({"thought_process": thought, "predicted_label": label})
    return f"[INST] Premise: {premise}. Hypothesis: {who} has {asked}. {ANSWER_MARKER} {answer}"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def build_model(
    folder: Path, *, hidden_size: int = 64, layers: int = 2, pad_token: str | None = None, experts: int = 0
) -> Path:
    """Save a random Mistral, or Qwen3-MoE with `experts`, and its tokenizer (vocabulary of about 400) to `folder`."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = _tokenizer(pad_token)
    torch.manual_seed(0)
    routed = {"num_experts": experts, "num_experts_per_tok": 2, "moe_intermediate_size": hidden_size}
    config_class, model_class = (
        (Qwen3MoeConfig, Qwen3MoeForCausalLM) if experts else (MistralConfig, MistralForCausalLM)
    )
    config = config_class(
        **(routed if experts else {}),
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    model_class(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer(pad_token: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", *([pad_token] if pad_token else [])]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in nli_rows(200, seed=9)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad_token
    )
    fast.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ raise_exception('only user and assistant take part') }}{% endif %}{% endfor %}"
    )
    return fast
