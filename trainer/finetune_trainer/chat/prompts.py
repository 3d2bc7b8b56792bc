"""Prompts as the adapter was trained on them: in its chat template, or as its rows' texts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data import formats
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.jinja import TemplateError
from finetune_trainer.data.row_files import DataFile
from finetune_trainer.data.row_format import ChatExample, FormatOptions, Message, RowFormat, TextExample
from finetune_trainer.data.rows import Row
from finetune_trainer.errors import DatasetInvalid
from finetune_trainer.evaluation.nli import split_row

#: An answer for rows that have none: formats want one. Nothing of it is shown or given to the model.
_NO_ANSWER: Final = "\0no answer"


@dataclass(frozen=True)
class Prompt:
    """Something to answer.

    Attributes:
        text: As it was given, for people.
        ids: As the model takes it.
        expected: The right answer, if it is known.
    """

    text: str
    ids: Sequence[int]
    expected: str | None = None


def of_text(text: str, spec: FineTuneJobSpec, encoder: Encoder) -> Prompt:
    """Return `text` as a row's prompt: where rows are an instruction, it is one."""
    if spec.dataset.format == "alpaca":
        row = formats.named("alpaca").to_example({"instruction": text, "output": _NO_ANSWER})
        return _prompt(row, text, spec, encoder)
    return Prompt(text, encoder.prompt(text))


def of_conversation(messages: Sequence[Message], encoder: Encoder) -> Prompt:
    """Return a conversation up to the assistant's next answer; raises TemplateError."""
    return Prompt(str(messages[-1]["content"]), encoder.chat_prompt(ChatExample(messages)))


def of_file(path: Path, spec: FineTuneJobSpec, encoder: Encoder) -> Iterator[Prompt]:
    """Yield the prompt of each row of a data file, in the format that the adapter was trained on; answers may lack.

    Raises:
        DatasetInvalid: A row is none of the format; with file and line.
    """
    found: RowFormat | None = None
    for row in DataFile(path, path.name).raw_rows():
        if row.problem:
            raise DatasetInvalid(str(row))
        answered = _answered(row, FormatOptions.of(spec.dataset))
        found = found or _format(answered, spec)
        checked = found.checked(answered)
        if checked.problem:
            raise DatasetInvalid(str(checked))
        example = found.to_example(checked.data)
        try:
            yield _prompt(example, "", spec, encoder)
        except (TemplateError, ValueError) as error:
            raise DatasetInvalid(str(row.refuse(str(error)))) from None


def _format(row: Row, spec: FineTuneJobSpec) -> RowFormat:
    options = FormatOptions.of(spec.dataset)
    if spec.dataset.format != "auto":
        return formats.named(spec.dataset.format, options)
    detected = formats.detect(row.data, options) if isinstance(row.data, dict) else None
    if detected is None:
        raise DatasetInvalid(str(row.refuse(f"needed are the columns {formats.needed_columns(options)}")))
    return detected


def _answered(row: Row, options: FormatOptions) -> Row:
    """Return `row` with something in the place of an answer that it lacks."""
    if not isinstance(row.data, dict):
        return row
    data: dict[str, Any] = row.data

    def name(column: str) -> str:
        return options.names.get(column, column)

    messages: Any = data.get(name("messages"))
    last = messages[-1] if isinstance(messages, list) and messages else None
    if isinstance(last, dict) and last.get("role") != "assistant":
        data = data | {name("messages"): [*messages, {"role": "assistant", "content": _NO_ANSWER}]}
    for question, answer in (("prompt", "completion"), ("instruction", "output")):
        if name(question) in data and data.get(name(answer)) is None:
            said: Any = _NO_ANSWER
            if isinstance(data[name(question)], list):
                said = [{"role": "assistant", "content": _NO_ANSWER}]
            data = data | {name(answer): said}
    return Row(row.file, row.line, data)


def _prompt(example: Any, text: str, spec: FineTuneJobSpec, encoder: Encoder) -> Prompt:
    """Return the prompt of an example; raises TemplateError, and ValueError where it has none."""
    parts = split_row(example, spec.evaluation.generation.answer_marker)
    if isinstance(parts, str):
        if not isinstance(example, TextExample):
            raise ValueError(parts)
        parts = (example.text, _NO_ANSWER)  # a text without an answer is all prompt
    prompt, answer = parts
    expected = (
        None
        if answer.startswith(_NO_ANSWER)
        else answer.strip().removesuffix(encoder.tokenizer.eos_token).strip() or None
    )
    if isinstance(prompt, str):
        return Prompt(text or prompt, encoder.prompt(prompt), expected)
    return Prompt(text or str(prompt.messages[-1].get("content")), encoder.chat_prompt(prompt), expected)
