"""Tokenize examples: the ids and labels that TRL's SFTTrainer would make of the same row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from finetune_trainer.data.row_format import ChatExample, CompletionExample, Example, Message, TextExample
from finetune_trainer.errors import reason

#: Label of a token on which no loss is taken.
IGNORE: Final = -100


class RowProblem(str):
    """Why a row cannot be tokenized."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row, labels (IGNORE where no loss is taken), and whether it was truncated."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool


class Encoder:
    """Tokenizes examples. Loss is taken on the whole text, on the completion, or on the assistant's turns.

    Attributes:
        tokenizer: The base model's tokenizer.
        max_length: Tokens after which a row is cut (`spec.training.maxLength`).
        masks_assistant: Whether the chat template marks the assistant's turns, so that only they are learned.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        template = tokenizer.chat_template
        self.masks_assistant = isinstance(template, str) and "generation" in template and "endgeneration" in template

    def encode(self, examples: Sequence[Example]) -> Iterator[EncodedRow | RowProblem]:
        """Yield one result per example, in order. Texts are tokenized in one batch."""
        texts = [example.text for example in examples if isinstance(example, TextExample)]
        whole = iter(self._texts(texts) if texts else ())
        for example in examples:
            if isinstance(example, TextExample):
                ids = next(whole)
                yield self._truncated(ids, ids)
            elif isinstance(example, CompletionExample):
                yield self._completion(example)
            else:
                yield self._chat(example)

    def _texts(self, texts: list[str], end: bool = True) -> list[list[int]]:
        """Return token ids with the tokenizer's own special tokens, one BOS where it is doubled, and EOS at the end."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        result = []
        for ids in self.tokenizer(texts, add_special_tokens=True)["input_ids"]:
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            result.append([*ids, eos] if end and ids[-1:] != [eos] else ids)
        return result

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a text for the model to continue."""
        ids = self._texts([text], end=False)[0]
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation up to the assistant's answer."""
        return list(self._template(messages, add_generation_prompt=True)["input_ids"])

    def _completion(self, example: CompletionExample) -> EncodedRow:
        prompt = self._texts([example.prompt], end=False)[0]
        return self._after_prompt(prompt, self._texts([example.prompt + example.completion])[0])

    def _chat(self, example: ChatExample) -> EncodedRow | RowProblem:
        try:
            if example.prompt_messages:
                prompt = self.chat_prompt(example.messages[: example.prompt_messages])
                return self._after_prompt(prompt, list(self._template(example.messages)["input_ids"]))
            encoded = self._template(example.messages, return_assistant_tokens_mask=self.masks_assistant)
        except _TemplateError as error:
            return RowProblem(error)
        ids = list(encoded["input_ids"])
        if not self.masks_assistant:
            return self._truncated(ids, ids)
        mask = encoded["assistant_masks"]
        return self._truncated(ids, [token if said else IGNORE for token, said in zip(ids, mask, strict=True)])

    def _after_prompt(self, prompt: list[int], ids: list[int]) -> EncodedRow:
        start = _common_prefix(prompt, ids)
        return self._truncated(ids, [IGNORE] * start + ids[start:])

    def _template(self, messages: Sequence[Message], **options: Any) -> Any:
        if not self.tokenizer.chat_template:
            raise _TemplateError("is a conversation, but the model's tokenizer has no chat template")
        try:
            return self.tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
        except Exception as error:
            # Templates run as Jinja code: they refuse, for example, roles that do not alternate, with any exception.
            raise _TemplateError(f"does not fit the chat template: {reason(error)}") from None

    def _truncated(self, ids: list[int], labels: list[int]) -> EncodedRow:
        return EncodedRow(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length)


class _TemplateError(Exception):
    pass


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
