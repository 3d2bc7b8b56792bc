"""Load the tokenizer and check it against the base model."""

import re
from pathlib import Path
from typing import Any, Final

import structlog

from finetune_trainer.errors import ConfigInvalid, whole_text

log = structlog.get_logger(__name__)
#: Whole names of tokens that models reserve for padding, then for anything; best first.
_PAD_TOKENS: Final = (
    r"<\|finetune_right_pad_id\|>",  # Llama 3
    r"<pad>|<PAD>|\[PAD\]|<\|pad\|>|<\|padding\|>|<\|pad_token\|>",
    r"<\|(vision|image|video|fim)_pad\|>|<fim_pad>",  # Qwen, StarCoder
    r"<\|reserved_(special_)?token_\d+\|>|<\|placeholder\d+\|>|<SPECIAL_\d+>",  # Llama 3, Phi 3, Mistral's newer ones
    r"\[control_\d+\]|<unused_?\d+>|\[unused\d+\]",  # Mistral 7B, Gemma
)


def load_tokenizer(folder: Path, source: str, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in `folder` for training: right padding, a pad token that is never EOS.

    Args:
        folder: The base model's files.
        source: The model's URI, for messages.
        trust_remote_code: Whether code of the model may run.

    Raises:
        ConfigInvalid: There is no usable tokenizer.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, use_fast=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigInvalid(f"spec.model.source: {source} has no usable tokenizer: {whole_text(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigInvalid(f"spec.model.source: the tokenizer of {source} has no end-of-sequence token")
    tokenizer.padding_side = "right"
    pad = choose_pad_token(tokenizer)
    if pad != tokenizer.pad_token:
        tokenizer.pad_token = pad
    log.info("Tokenizer loaded", size=len(tokenizer), pad_token=tokenizer.pad_token, eos_token=tokenizer.eos_token)
    return tokenizer


def choose_pad_token(tokenizer: Any) -> str:
    """Choose a pad token whose loss can be masked without masking EOS: the pad token, else unk, else a reserved one.

    Labels never depend on it (padding is masked by position), but other tools mask by id: with pad = EOS they would
    teach the model never to stop, with a word as pad never to say that word, and decoding drops what is special.
    So only an added token whose whole name says that it stands in no text will do. Raises ConfigInvalid when the
    vocabulary has nothing to spare.
    """
    never = {None, tokenizer.eos_token, tokenizer.bos_token}
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    spare = (token for pattern in _PAD_TOKENS for token in added if re.fullmatch(pattern, token))
    for candidate in (tokenizer.pad_token, tokenizer.unk_token, *spare):
        if candidate not in never:
            return str(candidate)
    raise ConfigInvalid(
        "spec.model.source: the tokenizer has no token to pad with other than the end-of-sequence token: "
        "give it a pad_token in tokenizer_config.json"
    )


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Raise ConfigInvalid if the tokenizer has more tokens than the model has embeddings: they are never resized."""
    if len(tokenizer) > vocab_size:
        raise ConfigInvalid(
            f"spec.model.source: the tokenizer has {len(tokenizer)} tokens, the model's embeddings {vocab_size}: "
            "embeddings are never resized here; resize and save the model first, or take its own tokenizer"
        )
