"""A prompt and its completion, as texts or as messages."""

from typing import Any

from finetune_trainer.data.row_format import (
    ChatExample,
    CompletionExample,
    RowFormat,
    messages_problem,
    text_problem,
)


class PromptCompletionFormat(RowFormat):
    """Rows of which only the completion is learned."""

    name = "prompt-completion"
    columns = ("prompt", "completion")

    def check(self, data: dict[str, Any]) -> str:
        prompt, completion = data["prompt"], data["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return text_problem("prompt", prompt) or text_problem("completion", completion)
        if isinstance(prompt, list) and isinstance(completion, list):
            return messages_problem("prompt", prompt) or messages_problem("completion", completion)
        return "'prompt' and 'completion' must both be strings, or both lists of messages"

    def to_example(self, data: dict[str, Any]) -> CompletionExample | ChatExample:
        prompt, completion = data["prompt"], data["completion"]
        if isinstance(prompt, str):
            return CompletionExample(prompt, completion)
        return ChatExample([*prompt, *completion], prompt_messages=len(prompt))
