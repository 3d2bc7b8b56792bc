"""Conversations: lists of messages with role and content, as OpenAI's fine-tuning files and TRL have them."""

from typing import Any

from finetune_trainer.data.conversation import chat_example, messages_problem, template_problem, unlearnable
from finetune_trainer.data.row_format import CHAT_COLUMNS, ChatExample, RowFormat


class MessagesFormat(RowFormat):
    """Rows with a conversation, of which the assistant's turns are learned, but those of weight 0."""

    name = "messages"
    columns = ("messages",)
    # How many tools may be called at a time is a wish to the model that wrote the row: no template writes it.
    optional = (*CHAT_COLUMNS, "parallel_tool_calls")

    def check(self, data: dict[str, Any]) -> str:
        name, messages = self.called("messages"), data["messages"]
        problem = messages_problem(name, messages) or template_problem(data)
        return problem or ("" if self.options.learns_all else unlearnable(name, messages))

    def to_example(self, data: dict[str, Any]) -> ChatExample:
        return chat_example(data["messages"], data)
