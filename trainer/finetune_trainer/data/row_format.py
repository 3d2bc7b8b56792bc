"""The seam for data formats: what a format says of its rows, and the examples that everything behind it works on."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

from finetune_api.spec_data import Dataset as DatasetSpec
from finetune_trainer.data.rows import Row

#: One turn of a conversation: role, content, perhaps tool_calls, and weight 0 if the assistant's is not learned.
Message = dict[str, Any]
#: Columns that every conversation may have beside its messages.
CHAT_COLUMNS: Final = ("tools", "chat_template_kwargs")


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
    assistant's turns, wherever they stand. `tools` and `template_options` are given to the template.
    """

    messages: Sequence[Message]
    prompt_messages: int = 0
    tools: Sequence[dict[str, Any]] = ()
    template_options: Mapping[str, Any] = field(default_factory=dict)


Example = TextExample | CompletionExample | ChatExample


@dataclass(frozen=True)
class FormatOptions:
    """What the spec says of the rows, beside their format.

    Attributes:
        names: Column of a format -> what the data calls it (`spec.dataset.columns`, `textField`).
        template: `spec.dataset.template`, or ''.
        learns_all: Whether prompts are learned too (`spec.dataset.loss: all`).
    """

    names: Mapping[str, str] = field(default_factory=dict)
    template: str = ""
    learns_all: bool = False

    @classmethod
    def of(cls, dataset: DatasetSpec) -> "FormatOptions":
        """Return the options of a job."""
        names = {"text": dataset.text_field} | (dataset.columns or {})
        different = {column: name for column, name in names.items() if column != name}
        return cls(different, dataset.template or "", dataset.loss == "all")


class RowFormat(ABC):
    """One format of data rows. To add one, see docs/extending/data-format.md.

    Attributes:
        name: What `spec.dataset.format` calls it.
        columns: Columns that every row needs, by which `format: auto` also detects the format.
        optional: Columns that are used where a row has them.
    """

    name: ClassVar[str]
    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def __init__(self, options: FormatOptions | None = None) -> None:
        self.options = options or FormatOptions()

    @abstractmethod
    def check(self, data: dict[str, Any]) -> str:
        """Return what is wrong with a row that has all columns, or '' if it can be used."""

    @abstractmethod
    def to_example(self, data: dict[str, Any]) -> Example:
        """Convert a row that passed the check."""

    def detect(self, columns: Collection[str]) -> bool:
        """Return whether rows with `columns`, by the data's own names, can be of this format."""
        return all(self.called(column) in columns for column in self.columns)

    def called(self, column: str) -> str:
        """Return what the data calls a column of this format."""
        return self.options.names.get(column, column)

    def unused(self, columns: Collection[str]) -> list[str]:
        """Return those of `columns`, by the data's own names, that nothing is learned of."""
        used = {self.called(column) for column in (*self.columns, *self.optional)}
        return [column for column in columns if column not in used]

    def checked(self, row: Row) -> Row:
        """Return `row` with this format's names for its columns, or with its problem if it is not of this format."""
        if row.problem:
            return row
        if not isinstance(row.data, dict):
            return row.refuse("is not a JSON object")
        data = row.data
        if self.options.names:
            data = data | {ours: data[name] for ours, name in self.options.names.items() if name in data}
        problem = self._missing(row.data) or self.check(data)
        return row.refuse(problem) if problem else Row(row.file, row.line, data)

    def _missing(self, data: dict[str, Any]) -> str:
        for name in map(self.called, self.columns):
            if name not in data:
                return f"has no column {name!r}; it has {', '.join(map(repr, data)) or 'none'}"
            if data[name] is None:
                return f"{name!r} is null"
        return ""

    def text_problem(self, column: str, value: Any) -> str:
        """Return what is wrong with the text in `column`, or ''."""
        if not isinstance(value, str):
            return f"{self.called(column)!r} must be a string, not {type(value).__name__}"
        return "" if value.strip() else f"{self.called(column)!r} is empty"
