"""Rows out of JSON Lines, JSON, CSV and Parquet files, each with its place, and what shape of row they have."""

from typing import Any, Literal

from finetune_trainer.data.rows import Row

Format = Literal["text", "prompt-completion", "messages"]
_ROLES = ("system", "user", "assistant", "tool", "developer")


def detect(columns: set[str], text_field: str) -> Format | None:
    """The shape of rows that have `columns`, None when they fit no shape."""
    if "messages" in columns:
        return "messages"
    if {"prompt", "completion"} <= columns:
        return "prompt-completion"
    return "text" if text_field in columns else None


def check(row: Row, shape: Format, text_field: str) -> Row:
    """`row`, or the row with its problem when it is not of `shape`."""
    if row.problem:
        return row
    if not isinstance(row.data, dict):
        return row.refuse("is not a JSON object")
    if shape == "messages":
        problem = _column(row.data, "messages") or _messages_problem("messages", row.data["messages"])
    elif shape == "prompt-completion":
        problem = _prompt_completion_problem(row.data)
    else:
        problem = _column(row.data, text_field) or _text_problem(text_field, row.data[text_field])
    return row.refuse(problem) if problem else row


def _column(data: dict[str, Any], name: str) -> str:
    if data.get(name) is not None:
        return ""
    return f"has no column {name!r}; it has {', '.join(map(repr, data)) or 'none'}"


def _text_problem(name: str, value: Any) -> str:
    if not isinstance(value, str):
        return f"{name!r} must be a string, not {type(value).__name__}"
    return "" if value.strip() else f"{name!r} is empty"


def _prompt_completion_problem(data: dict[str, Any]) -> str:
    if problem := _column(data, "prompt") or _column(data, "completion"):
        return problem
    prompt, completion = data["prompt"], data["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _text_problem("prompt", prompt) or _text_problem("completion", completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages_problem("prompt", prompt) or _messages_problem("completion", completion)
    return "'prompt' and 'completion' must both be strings, or both lists of messages"


def _messages_problem(name: str, value: Any) -> str:
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
