"""ShareGPT: a list of turns with from and value; of the same name are lists of messages with role and content."""

from typing import Any, Final

from finetune_trainer.data.conversation import chat_example, messages_problem, template_problem, unlearnable
from finetune_trainer.data.row_format import CHAT_COLUMNS, ChatExample, Message, RowFormat

#: Who speaks, by the names that data sets have for them.
_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


class ShareGptFormat(RowFormat):
    """Rows with a conversation, of which the assistant's turns are learned."""

    name = "sharegpt"
    columns = ("conversations",)
    optional = (*CHAT_COLUMNS, "system")

    def check(self, data: dict[str, Any]) -> str:
        name = self.called("conversations")
        problem = self._turns_problem(name, data["conversations"]) or template_problem(data)
        if not problem and data.get("system"):
            problem = self.text_problem("system", data["system"])
        if problem:
            return problem
        messages = self._messages(data)
        problem = messages_problem(name, messages)
        return problem or ("" if self.options.learns_all else unlearnable(name, messages))

    def to_example(self, data: dict[str, Any]) -> ChatExample:
        return chat_example(self._messages(data), data)

    def _turns_problem(self, name: str, turns: Any) -> str:
        if not isinstance(turns, list) or not turns:
            return f"{name!r} must be a list of turns with from and value, and not empty"
        for index, turn in enumerate(turns):
            where = f"'{name}[{index}]'"
            if not isinstance(turn, dict) or not ({"from", "value"} <= set(turn) or "role" in turn):
                return f"{where} must be an object with from and value"
            if "role" not in turn:
                if not isinstance(turn["from"], str) or turn["from"] not in _ROLES:
                    return f"{where}.from is {turn['from']!r}; it must be one of {', '.join(_ROLES)}"
                if not isinstance(turn["value"], str):
                    return f"{where}.value must be a string"
        return ""

    def _messages(self, data: dict[str, Any]) -> list[Message]:
        """Return the turns as messages, the system column first."""
        system = [{"role": "system", "content": data["system"]}] if data.get("system") else []
        return system + [turn if "role" in turn else _message(turn) for turn in data["conversations"]]


def _message(turn: dict[str, Any]) -> Message:
    rest = {key: value for key, value in turn.items() if key in ("weight", "tool_calls")}
    return {"role": _ROLES[turn["from"]], "content": turn["value"], **rest}
