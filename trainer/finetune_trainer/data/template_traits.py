"""What a chat template can write, found by trying it: templates are code, and nothing else tells."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

from finetune_trainer.data.jinja import EndlessTemplate, Renderer
from finetune_trainer.data.row_format import Message

#: Words that stand in no template.
_WORD: Final = "zq7word"
_ARGUMENT: Final = "zq7argument"
TOOL: Final = {
    "type": "function",
    "function": {
        "name": "zq7tool",
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {_ARGUMENT: {"type": "string", "description": "A word."}}},
    },
}


class TemplateTraits:
    """The traits of a tokenizer's chat template."""

    def __init__(self, tokenizer: Any, renderer: Renderer) -> None:
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._written: dict[str, bool] = {}

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the tools of a conversation come into its text."""
        turns = [{"role": "user", "content": self._content("?")}]
        return self._try(turns, tools=True) != self._try(turns)

    def writes(self, key: str) -> bool:
        """Whether what an assistant's message holds under `key`, beside its content, comes into the text."""
        if key not in self._written:
            turns = [{"role": role, "content": self._content("?")} for role in ("user", "assistant")]
            self._written[key] = _WORD in self._try([turns[0], turns[1] | {key: _WORD}])
        return self._written[key]

    @cached_property
    def content_as_parts(self) -> bool:
        """Whether content must be a list of parts, as templates of models for images want it."""
        parts = [{"type": "text", "text": _WORD}]
        as_text, as_parts = (self._try([{"role": "user", "content": content}]) for content in (_WORD, parts))
        return _WORD not in as_text and _WORD in as_parts

    @cached_property
    def arguments_form(self) -> type | None:
        """What stands for the arguments of a tool call: dict, str, or None if tool calls are not written."""
        asked = [{"role": "user", "content": self._content("?")}]
        before = self._try(asked, tools=True)
        for form, arguments in ((dict, {_ARGUMENT: "x"}), (str, json.dumps({_ARGUMENT: "x"}))):
            call = {"id": "zq7call00", "type": "function", "function": {"name": "zq7tool", "arguments": arguments}}
            for content in ({}, {"content": None}, {"content": self._content("")}):
                text = self._try([*asked, {"role": "assistant", "tool_calls": [call], **content}], tools=True)
                # Python's way to write an object is one that no model knows.
                if text.count(_ARGUMENT) > before.count(_ARGUMENT) and (form is str or f"'{_ARGUMENT}'" not in text):
                    return form
        return None

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self.content_as_parts else text

    def _try(self, messages: Sequence[Message], tools: bool = False) -> str:
        """Return what the template writes, '' if it refuses."""
        given = [TOOL] if tools else None
        try:
            template = self._tokenizer.get_chat_template(None, given)
            return self._renderer.render(messages, given, template, self._tokenizer.special_tokens_map)[0]
        except EndlessTemplate:
            raise
        except Exception:  # templates raise whatever Jinja and they themselves think of
            return ""
