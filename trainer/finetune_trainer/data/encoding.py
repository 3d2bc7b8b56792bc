"""The tokenizer, and rows turned into token ids with labels, as TRL's SFTTrainer would for the same row."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from finetune_trainer.data.formats import Format
from finetune_trainer.errors import ConfigInvalid, reason

log = structlog.get_logger(__name__)
IGNORE = -100
#: Whole names of tokens that models set aside for padding, then of those set aside for anything; best first.
_PAD_TOKENS: Final = (
    r"<\|finetune_right_pad_id\|>",  # Llama 3
    r"<pad>|<PAD>|\[PAD\]|<\|pad\|>|<\|padding\|>|<\|pad_token\|>",
    r"<\|(vision|image|video|fim)_pad\|>|<fim_pad>",  # Qwen, StarCoder
    r"<\|reserved_(special_)?token_\d+\|>|<\|placeholder\d+\|>|<SPECIAL_\d+>",  # Llama 3, Phi 3, Mistral's newer ones
    r"\[control_\d+\]|<unused_?\d+>|\[unused\d+\]",  # Mistral 7B, Gemma
)


class RowProblem(str):
    """Why a row cannot be tokenized."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row, labels (IGNORE where no loss is taken), and whether it was cut."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


def load_tokenizer(folder: Path, source: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer in `folder`, set up for training: right padding, a pad token that is never EOS.

    Raises ConfigInvalid, naming `source`.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code, use_fast=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigInvalid(f"spec.model.source: {source} has no usable tokenizer: {reason(error)}") from None
    if tokenizer.eos_token_id is None:
        raise ConfigInvalid(f"spec.model.source: the tokenizer of {source} has no end-of-sequence token")
    tokenizer.padding_side = "right"
    pad = choose_pad_token(tokenizer)
    if pad != tokenizer.pad_token:
        tokenizer.pad_token = pad
    log.info("Tokenizer loaded", size=len(tokenizer), pad_token=tokenizer.pad_token, eos_token=tokenizer.eos_token)
    return tokenizer


def choose_pad_token(tokenizer: Any) -> str:
    """A token for padding whose loss is masked without masking EOS: the pad token, else unk, else one set aside for it.

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
    """Refuse a tokenizer with more tokens than the model has embeddings: they are never resized here."""
    if len(tokenizer) > vocab_size:
        raise ConfigInvalid(
            f"spec.model.source: the tokenizer has {len(tokenizer)} tokens, the model's embeddings {vocab_size}: "
            "embeddings are never resized here; resize and save the model first, or take its own tokenizer"
        )


class Encoder:
    """Rows to token ids. Loss is taken on the whole text, on the completion, or on what the assistant says."""

    def __init__(self, tokenizer: Any, max_length: int, text_field: str = "text") -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.text_field = text_field
        template = tokenizer.chat_template
        self.masks_assistant = isinstance(template, str) and "generation" in template and "endgeneration" in template

    def encode(self, rows: Sequence[dict[str, Any]], shape: Format) -> Iterator[EncodedRow | RowProblem]:
        """One result per row, in order."""
        if shape == "text":
            yield from (self._cut(ids, ids) for ids in self._texts([row[self.text_field] for row in rows]))
        elif shape == "messages":
            yield from (self._messages(row) for row in rows)
        else:
            yield from (self._prompt_completion(row) for row in rows)

    def _texts(self, texts: list[str], end: bool = True) -> list[list[int]]:
        """Token ids with the tokenizer's own special tokens, a doubled BOS dropped, and EOS at the end."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        result = []
        for ids in self.tokenizer(texts, add_special_tokens=True)["input_ids"]:
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            result.append([*ids, eos] if end and ids[-1:] != [eos] else ids)
        return result

    def prompt(self, text: str) -> list[int]:
        """Token ids of a text that the model is to continue."""
        ids = self._texts([text], end=False)[0]
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def chat_prompt(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation up to where the assistant is to answer."""
        return list(self._template(messages, add_generation_prompt=True)["input_ids"])

    def _prompt_completion(self, row: dict[str, Any]) -> EncodedRow | RowProblem:
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            before, ids = self._texts([prompt], end=False)[0], self._texts([prompt + completion])[0]
        else:
            try:
                before, ids = self.chat_prompt(prompt), list(self._template([*prompt, *completion])["input_ids"])
            except _TemplateError as error:
                return RowProblem(error)
        start = _common_prefix(before, ids)
        return self._cut(ids, [IGNORE] * start + ids[start:])

    def _messages(self, row: dict[str, Any]) -> EncodedRow | RowProblem:
        try:
            encoded = self._template(row["messages"], return_assistant_tokens_mask=self.masks_assistant)
        except _TemplateError as error:
            return RowProblem(error)
        ids = list(encoded["input_ids"])
        if not self.masks_assistant:
            return self._cut(ids, ids)
        mask = encoded["assistant_masks"]
        return self._cut(ids, [token if said else IGNORE for token, said in zip(ids, mask, strict=True)])

    def _template(self, messages: Sequence[dict[str, Any]], **options: Any) -> Any:
        if not self.tokenizer.chat_template:
            raise _TemplateError("is a conversation, but the model's tokenizer has no chat template")
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
        except Exception as error:
            # Templates run as Jinja code: they refuse, for example, roles that do not alternate, with any exception.
            raise _TemplateError(f"does not fit the chat template: {reason(error)}") from None

    def _cut(self, ids: list[int], labels: list[int]) -> EncodedRow:
        return EncodedRow(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length)


class _TemplateError(Exception):
    pass


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
