"""Checks of conversations, shared by the formats that hold them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from finetune_trainer.data.row_format import ChatExample, Message

_ROLES: Final = ("system", "user", "assistant", "tool", "developer")
#: Names that a row may not give to the chat template, for they are arguments of its own.
_TAKEN: Final = (
    "conversation", "conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens",
)  # fmt: skip


def messages_problem(name: str, value: Any) -> str:
    """Return what is wrong with the list of messages in column `name`, or ''."""
    if not isinstance(value, list) or not value:
        said = ", not a string" if isinstance(value, str) else ", and not empty"
        return f"{name!r} must be a list of messages with role and content{said}"
    for index, message in enumerate(value):
        where = f"'{name}[{index}]'"
        if not isinstance(message, dict):
            return f"{where} must be an object with role and content"
        if message.get("role") not in _ROLES:
            return f"{where}.role is {message.get('role')!r}; it must be one of {', '.join(_ROLES)}"
        calls = message.get("tool_calls")
        if calls and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            return f"{where}.tool_calls must be a list of objects"
        if message.get("function_call"):
            return f"{where}.function_call is not read: write it as tool_calls, with role tool for what it returns"
        if not isinstance(message.get("content"), str) and not calls:
            return f"{where}.content must be a string"
        if (weight := message.get("weight")) is not None and (isinstance(weight, bool) or weight not in (0, 1)):
            return f"{where}.weight is {weight!r}; it must be 0 or 1"
    return ""


def unlearnable(name: str, messages: Sequence[Message]) -> str:
    """Return why nothing is learned of checked messages in column `name`, or ''."""
    said = [message for message in messages if message["role"] == "assistant"]
    if not said:
        return f"{name!r} has no assistant turn to learn from"
    learned = [message for message in said if message.get("weight") != 0]
    if not learned:
        return f"{name!r} has only turns of weight 0"
    return "" if any(map(says_something, learned)) else f"{name!r} has no assistant turn that says something"


def says_something(message: Message) -> bool:
    """Return whether a checked message has content, or calls a tool."""
    return bool(message.get("tool_calls") or message["content"].strip())


def template_problem(data: Mapping[str, Any]) -> str:
    """Return what is wrong with the columns that are given to the chat template, or ''."""
    tools, options = data.get("tools"), data.get("chat_template_kwargs")
    if tools:
        found = _decoded(tools)
        if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
            return "'tools' must be a list of objects, or its JSON text"
    if options:
        found = _decoded(options)
        if not isinstance(found, dict):
            return "'chat_template_kwargs' must be an object, or its JSON text"
        if taken := next((name for name in found if name in _TAKEN), None):
            return f"'chat_template_kwargs' must not hold {taken!r}"
    return ""


def chat_example(messages: Sequence[Message], data: Mapping[str, Any], prompt_messages: int = 0) -> ChatExample:
    """Return the example of checked messages, and of what the row gives to the chat template."""
    tools, options = data.get("tools"), data.get("chat_template_kwargs")
    return ChatExample(
        messages, prompt_messages, _decoded(tools) if tools else (), _decoded(options) if options else {}
    )


def _decoded(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
