"""Conversations: lists of messages with role and content."""

from typing import Any

from finetune_trainer.data.row_format import ChatExample, RowFormat, messages_problem


class MessagesFormat(RowFormat):
    """Rows with a conversation, of which the assistant's turns are learned."""

    name = "messages"
    columns = ("messages",)

    def check(self, data: dict[str, Any]) -> str:
        return messages_problem("messages", data["messages"])

    def to_example(self, data: dict[str, Any]) -> ChatExample:
        return ChatExample(data["messages"])
