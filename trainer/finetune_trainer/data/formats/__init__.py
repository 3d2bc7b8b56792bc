"""The data formats, one module each. Code behind them sees examples, never a format's name."""

from collections.abc import Collection
from typing import Final

from finetune_trainer.data.formats.alpaca import AlpacaFormat
from finetune_trainer.data.formats.messages import MessagesFormat
from finetune_trainer.data.formats.prompt_completion import PromptCompletionFormat
from finetune_trainer.data.formats.sharegpt import ShareGptFormat
from finetune_trainer.data.formats.template import TemplateFormat
from finetune_trainer.data.formats.text import TextFormat
from finetune_trainer.data.row_format import FormatOptions, RowFormat

#: Every format, in the order that detection asks them: a template first, for the user wrote it, and text last.
FORMATS: Final[list[type[RowFormat]]] = [
    TemplateFormat,
    MessagesFormat,
    ShareGptFormat,
    PromptCompletionFormat,
    AlpacaFormat,
    TextFormat,
]


def named(name: str, options: FormatOptions | None = None) -> RowFormat:
    """Return the format that `spec.dataset.format` calls `name`; raises KeyError if there is none."""
    return {each.name: each for each in FORMATS}[name](options)


def detect(columns: Collection[str], options: FormatOptions | None = None) -> RowFormat | None:
    """Return the first format whose columns are all among `columns`, or None."""
    candidates = (each(options) for each in FORMATS)
    return next((each for each in candidates if each.detect(columns)), None)


def needed_columns(options: FormatOptions | None = None) -> str:
    """Return the columns of each format in words, for the message that none was detected."""
    known = [each(options) for each in reversed(FORMATS)]
    return ", or ".join(
        " and ".join(repr(each.called(name)) for name in each.columns) for each in known if each.columns
    )
