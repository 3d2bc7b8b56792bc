"""The tokenizer, and rows turned into token ids with labels, as TRL's SFTTrainer would for the same row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import structlog

from finetune_trainer.data.formats import Format
from finetune_trainer.errors import reason

log = structlog.get_logger(__name__)
IGNORE = -100


class RowProblem(str):
    """Why a row cannot be tokenized."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row, labels (IGNORE where no loss is taken), and whether it was cut."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


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
