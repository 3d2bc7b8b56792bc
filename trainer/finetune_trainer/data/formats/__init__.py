"""The data formats, one module each. Code behind them sees examples, never a format's name."""

from collections.abc import Collection
from typing import Final

from finetune_trainer.data.formats.messages import MessagesFormat
from finetune_trainer.data.formats.prompt_completion import PromptCompletionFormat
from finetune_trainer.data.formats.text import TextFormat
from finetune_trainer.data.row_format import RowFormat

#: Every format, in the order that detection asks them: text last, because the user chooses its column's name.
FORMATS: Final[list[type[RowFormat]]] = [MessagesFormat, PromptCompletionFormat, TextFormat]


def named(name: str, text_field: str = "text") -> RowFormat:
    """Return the format that `spec.dataset.format` calls `name`; raises KeyError if there is none."""
    return {each.name: each for each in FORMATS}[name](text_field)


def detect(columns: Collection[str], text_field: str = "text") -> RowFormat | None:
    """Return the first format whose columns are all among `columns`, or None."""
    candidates = (each(text_field) for each in FORMATS)
    return next((each for each in candidates if each.detect(columns)), None)


def needed_columns(text_field: str = "text") -> str:
    """Return the columns of each format in words, for the message that none was detected."""
    each = (" and ".join(map(repr, known(text_field).columns)) for known in reversed(FORMATS))
    return ", or ".join(each)
