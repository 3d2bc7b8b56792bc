"""Conversations as text: what the chat template writes, and where in it the assistant speaks.

Three ways tell the assistant's turns from the rest, the surest first: markers in the model's own template
(`{% generation %}`), TRL's training template of the same family, and how the text grows from turn to turn.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from finetune_trainer.data.jinja import EndlessTemplate, Renderer, Span, TemplateError
from finetune_trainer.data.row_format import ChatExample, Message
from finetune_trainer.data.rows import half_character
from finetune_trainer.data.template_traits import TOOL, TemplateTraits
from finetune_trainer.errors import reason

#: What a model has thought before it spoke, by the names that data sets and templates have for it.
_THOUGHTS: Final = ("reasoning_content", "reasoning", "thinking")
_MARKERS: Final = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Written:
    """A conversation as text.

    Attributes:
        text: What the template makes of it.
        spans: What the assistant says, in order.
        missed: Turns of the assistant that could not be told from the rest.
    """

    text: str
    spans: Sequence[Span] = ()
    missed: int = 0


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
        notes: What the user should know of the template, found while it was used.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._renderer = Renderer()
        self._traits = TemplateTraits(tokenizer, self._renderer)
        self.notes: dict[str, None] = {}

    def prompt(self, example: ChatExample) -> str:
        """Return the text of the example's messages, up to where the assistant's answer begins."""
        return self._render(example, self._messages(example), asks=True)[0]

    def whole(self, example: ChatExample) -> str:
        """Return the text of all messages."""
        return self._render(example, self._messages(example))[0]

    def prompt_and_whole(self, example: ChatExample) -> tuple[str, str]:
        """Return the text of the first `prompt_messages`, up to the answer, and that of all messages."""
        messages = self._messages(example)
        prompt = self._render(example, messages[: example.prompt_messages], asks=True)[0]
        return prompt, self._render(example, messages)[0]

    def assistant_turns(self, example: ChatExample) -> Written:
        """Return the text of all messages, and where the assistant speaks in it.

        Raises:
            TemplateError: The template refuses the conversation, or no turn can be told from the rest.
        """
        messages = self._messages(example)
        text, marked = self._render(example, messages, training=True)
        said = [message for message in messages if message["role"] == "assistant"]
        learned = [message.get("weight") != 0 for message in said]
        if marked and (all(learned) or len(marked) == len(said)):
            if len(marked) == len(said):
                marked = [span for span, wanted in zip(marked, learned, strict=True) if wanted]
            return Written(text, marked)
        spans = self._by_growth(example, messages, text)
        missed = sum(learned) - len(spans)
        if not spans:
            raise TemplateError(
                "has no assistant turn that can be told from the rest: the chat template writes a conversation anew"
                " with every turn; dataset.loss: all learns the whole text"
            )
        return Written(text, spans, missed)

    def _by_growth(self, example: ChatExample, messages: Sequence[Message], text: str) -> list[Span]:
        """Return where the assistant speaks: what each of its turns adds to the text of the turns before it."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("weight") != 0:
                try:
                    span = self._added(example, messages, index, text)
                except EndlessTemplate:
                    raise
                except TemplateError:  # some templates refuse a part of what they take as a whole
                    continue
                if span:
                    spans.append(span)
        return spans

    def _added(self, example: ChatExample, messages: Sequence[Message], index: int, text: str) -> Span | None:
        before = self._render(example, messages[:index], training=True)[0] if index else ""
        asked = self._render(example, messages[:index], asks=True, training=True)[0]
        start = common_prefix(asked, text)
        if start < len(before.rstrip()):
            return None
        if index == len(messages) - 1:
            return (start, len(text))
        until = self._render(example, messages[: index + 1], training=True)[0]
        for end in (until, until.rstrip(), until.rstrip().removesuffix(self._tokenizer.eos_token or "")):
            if text.startswith(end) and len(end) > start:
                return (start, len(end))
        return None

    def _render(
        self, example: ChatExample, messages: Sequence[Message], *, asks: bool = False, training: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the text of `messages`, and the spans that the template marks.

        Args:
            example: Its tools and options are given to the template.
            messages: May be a part of the example's.
            asks: Whether the text ends where the assistant's answer begins.
            training: Whether to take TRL's training template if there is one.
        """
        tools = list(example.tools) or None
        template = (training and self._training_template) or self._own_template(bool(tools))
        marks = training and _MARKERS.search(template) is not None
        options = self._special_tokens | dict(example.template_options)
        # As apply_chat_template does: many templates take a key without a value for a value. Some need the key.
        brief = [{key: value for key, value in each.items() if value is not None} for each in messages]
        try:
            try:
                text, spans = self._renderer.render(brief, tools, template, options, marks=marks, asks=asks)
            except Exception:
                if brief == messages:
                    raise
                text, spans = self._renderer.render(messages, tools, template, options, marks=marks, asks=asks)
        except EndlessTemplate:
            raise
        except Exception as error:
            # Templates run as Jinja code: they refuse, for example, roles that do not alternate, with any exception.
            raise TemplateError(f"does not fit the chat template: {reason(error)}") from None
        # JSON texts within a row, and the template itself, may escape it.
        if problem := half_character(text):
            raise TemplateError(f"{problem}, once the chat template has written it")
        if tools and not self._traits.writes_tools:
            self.notes["Chat template does not write the tools of a row: the model learns without them"] = None
        return text, spans

    def _own_template(self, with_tools: bool) -> str:
        if not self._tokenizer.chat_template:
            raise TemplateError("is a conversation, but the model's tokenizer has no chat template")
        try:
            return str(self._tokenizer.get_chat_template(None, [TOOL] if with_tools else None))
        except Exception as error:  # a list of templates without a default one, or what is no template at all
            raise TemplateError(f"is a conversation, and the chat template is none: {reason(error)}") from None

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return dict(self._tokenizer.special_tokens_map)

    @cached_property
    def _training_template(self) -> str | None:
        """TRL's template of the family, which marks the assistant's turns, or None if the model's does."""
        template = self._tokenizer.chat_template
        if not isinstance(template, str) or _MARKERS.search(template):
            return None
        from trl.chat_template_utils import get_training_chat_template

        try:
            with self._renderer.bounded():
                found: str | None = get_training_chat_template(self._tokenizer)
        except EndlessTemplate:
            raise
        except Exception:  # it asks the template about things that the template may refuse with any exception
            return None
        return found

    def _messages(self, example: ChatExample) -> list[Message]:
        """Return the messages, contents and arguments of tool calls in the form that the template takes."""
        messages = list(example.messages)
        if any(message.get("tool_calls") for message in messages):
            form = self._traits.arguments_form
            if form is None:
                raise TemplateError("has tool calls, and the chat template writes none")
            messages = [_with_arguments(message, index, form) for index, message in enumerate(messages)]
        for key in _THOUGHTS:
            if any(message.get(key) for message in messages) and not self._traits.writes(key):
                self.notes[f"Chat template does not write {key} of a message: the model learns without it"] = None
        return [_in_parts(message) for message in messages] if self._traits.content_as_parts else messages


def _in_parts(message: Message) -> Message:
    content = message.get("content")
    return message | {"content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _with_arguments(message: Message, index: int, form: type) -> Message:
    """Return `message` with the arguments of its tool calls as `form`: an object, or its JSON text."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for position, call in enumerate(message["tool_calls"]):
        function = call.get("function") if isinstance(call, dict) else None
        holder = function if isinstance(function, dict) else call
        if isinstance(holder, dict) and "arguments" in holder:
            where = f"'messages[{index}].tool_calls[{position}]'.arguments"
            holder = holder | {"arguments": _arguments(holder["arguments"], form, where)}
            call = call | {"function": holder} if isinstance(function, dict) else holder
        calls.append(call)
    # Without content or with null means the same; some templates need the key.
    return {"content": None} | message | {"tool_calls": calls}


def _arguments(value: Any, form: type, where: str) -> Any:
    if isinstance(value, str):
        try:
            decoded = json.loads(value or "{}")
        except (ValueError, RecursionError):
            decoded = None
        if not isinstance(decoded, dict):
            raise TemplateError(f"{where} must be an object, or its JSON text")
        return decoded if form is dict else value
    if not isinstance(value, dict):
        raise TemplateError(f"{where} must be an object, or its JSON text")
    return value if form is dict else json.dumps(value, ensure_ascii=False)


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return how many tokens or characters both begin with."""
    if first == second[: len(first)]:
        return len(first)
    same = (index for index, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    return next(same, min(len(first), len(second)))
