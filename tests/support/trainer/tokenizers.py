"""Small tokenizers of the kinds that models have: bytes under the usual rules, and pieces that fall back to bytes."""

import json
from typing import Any

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEXT = "anna's bread and 12345 ropes,  ünïcode\n\n 你好 -- don't!"


def of_bytes(expression: str = "", *, digits: bool = False, ignore_merges: bool = False) -> Any:
    """A byte-level BPE that splits text by `expression`, or as GPT-2 does."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not expression)]
    if expression:
        steps.insert(0, pre_tokenizers.Split(Regex(expression), "isolated"))
    if digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def of_pieces(*, adds_space: bool = True) -> Any:
    """A BPE of pieces as Llama 2's (or Gemma's, which puts no space before a text), with <s> before each text."""
    from tokenizers import Tokenizer, models, normalizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if adds_space else spaces
    bytes_ = [f"<0x{value:02X}>" for value in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator([f"▁anna▁has▁bread▁{word}" for word in ("and", "or", "but", "an")], trainer)
    read = json.loads(tokenizer.to_str())
    read["added_tokens"] = [each for each in read["added_tokens"] if each["content"] not in bytes_]
    tokenizer = Tokenizer.from_str(json.dumps(read))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


#: How a tokenizer marks spaces, a chat template with [INST] as a token, and whether llama.cpp is to put spaces before
#: text so that both tokenize alike; None where they never do.
MISTRALS = (
    ("first", "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}{% endfor %}", False),
    ("first", "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}{% endfor %}", False),
    ("always", "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}{% endfor %}", False),
    ("always", "{{ bos_token }}{% for m in messages %}[INST]{{ m.content }}{% endfor %}", True),
    ("first", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", True),
    ("first", "{% for m in messages %}{{ m.role }}:[INST]{{ m.content }}{% endfor %}", None),
)


def of_words(scheme: str, template: str | None) -> Any:
    """A BPE of pieces as Mistral's, which splits words at spaces."""
    from tokenizers import pre_tokenizers

    tokenizer = of_pieces()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[INST]"]})
    tokenizer.chat_template = template
    return tokenizer
