"""One column with the whole text."""

from typing import Any

from finetune_trainer.data.row_format import RowFormat, TextExample, text_problem


class TextFormat(RowFormat):
    """Rows with a text that is learned whole, in the column that `spec.dataset.textField` names."""

    name = "text"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text_field,)

    def check(self, data: dict[str, Any]) -> str:
        return text_problem(self.text_field, data[self.text_field])

    def to_example(self, data: dict[str, Any]) -> TextExample:
        return TextExample(data[self.text_field], self.text_field)
