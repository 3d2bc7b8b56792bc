"""One column with the whole text."""

from typing import Any

from finetune_trainer.data.row_format import RowFormat, TextExample


class TextFormat(RowFormat):
    """Rows with a text that is learned whole, in the column that `spec.dataset.textField` names."""

    name = "text"
    columns = ("text",)

    def check(self, data: dict[str, Any]) -> str:
        return self.text_problem("text", data["text"])

    def to_example(self, data: dict[str, Any]) -> TextExample:
        return TextExample(data["text"], self.called("text"))
