"""Rows of any columns, written out by `spec.dataset.template`."""

import re
from typing import Any, Final

from finetune_trainer.data.row_format import CompletionExample, FormatOptions, RowFormat, TextExample

_PARTS: Final = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
#: Columns that hold the answer: the one that the template names, else the first that there is.
_ANSWERS: Final = ("completion", "output")


class TemplateFormat(RowFormat):
    """Rows whose text the spec's template makes.

    With a column completion (or output), that is what is learned, and the rest of the template is its prompt; without
    one, the whole text is learned.
    """

    name = "template"

    def __init__(self, options: FormatOptions | None = None) -> None:
        super().__init__(options)
        named = [part[1] for part in _PARTS.finditer(self.options.template) if part[1]]
        self.columns = tuple(dict.fromkeys(named))
        self.optional = tuple(name for name in _ANSWERS if name not in named)
        self._answers = sorted(_ANSWERS, key=lambda name: name not in named)

    def detect(self, columns: Any) -> bool:
        return bool(self.options.template)

    def check(self, data: dict[str, Any]) -> str:
        answer = self._answer(data)
        for name in (*self.columns, *([answer] if answer else [])):
            if not isinstance(data[name], str):
                return f"{self.called(name)!r} must be a string, not {type(data[name]).__name__}"
        if answer:
            return self.text_problem(answer, data[answer])
        return "" if self._written(data, self.options.template).strip() else "dataset.template makes no text of it"

    def to_example(self, data: dict[str, Any]) -> CompletionExample | TextExample:
        template, answer = self.options.template, self._answer(data)
        if answer is None:
            return TextExample(self._written(data, template), "dataset.template")
        prompt, _, rest = _split(template, answer)
        return CompletionExample(self._written(data, prompt), data[answer] + self._written(data, rest))

    def _answer(self, data: dict[str, Any]) -> str | None:
        return next((name for name in self._answers if data.get(name) is not None), None)

    def _written(self, data: dict[str, Any], template: str) -> str:
        return _PARTS.sub(lambda part: data[part[1]] if part[1] else part[0][0], template)


def _split(template: str, answer: str) -> tuple[str, str, str]:
    """Return what stands before, as and after the column `answer`; all of the template is before what it lacks."""
    for part in _PARTS.finditer(template):
        if part[1] == answer:
            return template[: part.start()], part[0], template[part.end() :]
    return template, "", ""
