"""Tokenize examples: the ids and labels that TRL's SFTTrainer would make of the same row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from finetune_trainer.data.chat_template import ChatTemplate, Written, common_prefix
from finetune_trainer.data.jinja import EndlessTemplate, Span, TemplateError
from finetune_trainer.data.row_format import ChatExample, CompletionExample, Example, TextExample

#: Label of a token on which no loss is taken.
IGNORE: Final = -100


class RowProblem(str):
    """Why a row cannot be tokenized."""


class LastProblem(RowProblem):
    """Why no row can be."""


@dataclass(frozen=True)
class EncodedRow:
    """Token ids of one row, labels (IGNORE where no loss is taken), and whether it was truncated.

    `missed_turns` of the assistant are not learned, for they could not be told from the rest of the conversation.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    missed_turns: int = 0


class Encoder:
    """Tokenizes examples. Loss is taken on the whole text, on the completion, or on the assistant's turns.

    Attributes:
        tokenizer: The base model's tokenizer.
        max_length: Tokens after which a row is cut (`spec.training.maxLength`).
        learns_all: Whether every token is learned, prompts included (`spec.dataset.loss: all`).
        template: The tokenizer's chat template.
    """

    def __init__(self, tokenizer: Any, max_length: int, learns_all: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.learns_all = learns_all
        self.template = ChatTemplate(tokenizer)

    def encode(self, examples: Sequence[Example]) -> Iterator[EncodedRow | RowProblem]:
        """Yield one result per example, in order. Texts are tokenized in batches."""
        texts = iter(self._whole_texts([each for each in examples if isinstance(each, TextExample)]))
        completions = iter(self._completions([each for each in examples if isinstance(each, CompletionExample)]))
        chats = iter(self._chats([each for each in examples if isinstance(each, ChatExample)]))
        for example in examples:
            kind = texts if isinstance(example, TextExample) else chats
            yield next(completions if isinstance(example, CompletionExample) else kind)

    def prompt(self, text: str) -> list[int]:
        """Return the token ids of a text for the model to continue."""
        ids = self._texts([text], end=False)[0]
        return ids[:-1] if ids[-1:] == [self.tokenizer.eos_token_id] else ids

    def chat_prompt(self, example: ChatExample) -> list[int]:
        """Return the token ids of a conversation up to the assistant's answer; raises TemplateError."""
        ids: list[int] = self._tokenized([self.template.prompt(example)])["input_ids"][0]
        return ids

    def _texts(self, texts: list[str], end: bool = True) -> list[list[int]]:
        """Return token ids with the tokenizer's own special tokens, one BOS and one EOS where they are doubled."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        result = []
        for ids in self._ids(texts) if texts else ():
            if bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            if ids[-2:] == [eos, eos]:
                ids = ids[:-1]
            result.append([*ids, eos] if end and ids[-1:] != [eos] else ids)
        return result

    def _ids(self, texts: list[str]) -> list[list[int]]:
        """Return token ids with special tokens. Without the place of each token it takes a fifth less time."""
        tokenizer = self.tokenizer
        if not getattr(tokenizer, "is_fast", False) or not type(tokenizer).__module__.startswith("transformers."):
            ids: list[list[int]] = tokenizer(texts, add_special_tokens=True, return_attention_mask=False)["input_ids"]
            return ids
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = tokenizer.split_special_tokens
        return [encoding.ids for encoding in backend.encode_batch_fast(texts)]

    def _tokenized(self, texts: list[str]) -> Any:
        # A chat template writes the special tokens itself.
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)

    def _whole_texts(self, examples: list[TextExample]) -> Iterator[EncodedRow]:
        for ids in self._texts([example.text for example in examples]):
            yield self._row(ids, ids)

    def _completions(self, examples: list[CompletionExample]) -> Iterator[EncodedRow]:
        prompts = self._texts([example.prompt for example in examples], end=False)
        wholes = self._texts([example.prompt + example.completion for example in examples])
        for prompt, ids in zip(prompts, wholes, strict=True):
            yield self._after(prompt, ids)

    def _chats(self, examples: list[ChatExample]) -> Iterator[EncodedRow | RowProblem]:
        written = [self._written(example) for example in examples]
        good = [each for each in written if not isinstance(each, RowProblem)]
        ids = self._tokenized([each.text for _, each in good]) if good else None
        asked = [prompt for prompt, _ in good if prompt]
        prompts = iter(self._tokenized(asked)["input_ids"] if asked else ())
        position = 0
        for each in written:
            if isinstance(each, RowProblem):
                yield each
                continue
            prompt, found = each
            yield self._chat(next(prompts) if prompt else [], found, ids, position)
            position += 1

    def _written(self, example: ChatExample) -> tuple[str, Written] | RowProblem:
        """Return the text of the prompt ('' if it is not known apart), and of the whole conversation."""
        try:
            if self.learns_all:
                return "", Written(self.template.whole(example))
            if example.prompt_messages:
                prompt, whole = self.template.prompt_and_whole(example)
                return prompt, Written(whole)
            return "", self.template.assistant_turns(example)
        except EndlessTemplate as error:
            return LastProblem(error)
        except TemplateError as error:
            return RowProblem(error)

    def _chat(self, prompt: list[int], written: Written, encoding: Any, position: int) -> EncodedRow:
        ids = encoding["input_ids"][position]
        if prompt:
            return self._after(prompt, ids)
        if self.learns_all:
            return self._row(ids, ids)
        labels = [IGNORE] * len(ids)
        for span in written.spans:
            first, end = self._tokens(encoding, position, written.text, span)
            labels[first:end] = ids[first:end]
        return self._row(ids, labels, written.missed)

    def _tokens(self, encoding: Any, position: int, text: str, span: Span) -> tuple[int, int]:
        """Return the first and the last token (exclusive) of a span of the text."""
        start, end = span
        ids = encoding["input_ids"][position]
        if not encoding.is_fast:  # this tokenizer does not tell which characters a token stands for
            first, last = self._tokenized([text[:start], text[:end]])["input_ids"]
            return common_prefix(first, ids), common_prefix(last, ids)
        inside = range(start, end)
        first = next((token for at in inside if (token := encoding.char_to_token(position, at)) is not None), len(ids))
        last = next(
            (token for at in reversed(inside) if (token := encoding.char_to_token(position, at)) is not None), -1
        )
        while last + 1 < len(ids) and _is_within(encoding.token_to_chars(position, last + 1), span):
            last += 1  # of a character of several tokens, only the first is found by the character
        return first, last + 1

    def _after(self, prompt: list[int], ids: list[int]) -> EncodedRow:
        start = 0 if self.learns_all else common_prefix(prompt, ids)
        return self._row(ids, [IGNORE] * start + ids[start:])

    def _row(self, ids: list[int], labels: list[int], missed: int = 0) -> EncodedRow:
        return EncodedRow(ids[: self.max_length], labels[: self.max_length], len(ids) > self.max_length, missed)


def _is_within(characters: Any, span: Span) -> bool:
    return characters is not None and span[0] <= characters.start < characters.end <= span[1]
