"""The seam for data formats: what a format says of its rows, and the examples that everything behind it works on."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from finetune_trainer.data.rows import Row

#: One turn of a conversation: role, content, perhaps tool_calls.
Message = dict[str, Any]
_ROLES: Final = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class TextExample:
    """A text that is learned whole. `column` names it in messages."""

    text: str
    column: str = "text"


@dataclass(frozen=True)
class CompletionExample:
    """A prompt and the text that completes it; only the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class ChatExample:
    """A conversation, written out by the tokenizer's chat template.

    The first `prompt_messages` are the prompt and everything after them is learned. With 0, what is learned are the
    assistant's turns, wherever they stand.
    """

    messages: Sequence[Message]
    prompt_messages: int = 0


Example = TextExample | CompletionExample | ChatExample


class RowFormat(ABC):
    """One format of data rows. To add one, see docs/extending/data-format.md.

    Attributes:
        name: What `spec.dataset.format` calls it.
        text_field: `spec.dataset.textField`, for formats whose column the user names.
    """

    name: ClassVar[str]

    def __init__(self, text_field: str = "text") -> None:
        self.text_field = text_field

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Columns that every row needs, by which `format: auto` also detects the format."""

    @abstractmethod
    def check(self, data: dict[str, Any]) -> str:
        """Return what is wrong with a row that has all columns, or '' if it can be used."""

    @abstractmethod
    def to_example(self, data: dict[str, Any]) -> Example:
        """Convert a row that passed the check."""

    def detect(self, columns: Collection[str]) -> bool:
        """Return whether rows with `columns` can be of this format."""
        return set(self.columns) <= set(columns)

    def checked(self, row: Row) -> Row:
        """Return `row`, or the row with its problem if it is not of this format."""
        if row.problem:
            return row
        problem = self._problem(row.data)
        return row.refuse(problem) if problem else row

    def _problem(self, data: Any) -> str:
        if not isinstance(data, dict):
            return "is not a JSON object"
        for name in self.columns:
            if data.get(name) is None:
                return f"has no column {name!r}; it has {', '.join(map(repr, data)) or 'none'}"
        return self.check(data)


def text_problem(name: str, value: Any) -> str:
    """Return what is wrong with the text in column `name`, or ''."""
    if not isinstance(value, str):
        return f"{name!r} must be a string, not {type(value).__name__}"
    return "" if value.strip() else f"{name!r} is empty"


def messages_problem(name: str, value: Any) -> str:
    """Return what is wrong with the list of messages in column `name`, or ''."""
    if not isinstance(value, list) or not value:
        return f"{name!r} must be a list of messages with role and content, and not empty"
    for index, message in enumerate(value):
        where = f"'{name}[{index}]'"
        if not isinstance(message, dict):
            return f"{where} must be an object with role and content"
        if message.get("role") not in _ROLES:
            return f"{where}.role is {message.get('role')!r}; it must be one of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"{where}.content must be a string"
    return ""
