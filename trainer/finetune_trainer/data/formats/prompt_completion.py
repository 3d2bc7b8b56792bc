"""A prompt and its completion, as texts or as messages."""

from typing import Any

from finetune_trainer.data.conversation import chat_example, messages_problem, says_something, template_problem
from finetune_trainer.data.row_format import CHAT_COLUMNS, ChatExample, CompletionExample, RowFormat


class PromptCompletionFormat(RowFormat):
    """Rows of which only the completion is learned."""

    name = "prompt-completion"
    columns = ("prompt", "completion")
    optional = CHAT_COLUMNS

    def check(self, data: dict[str, Any]) -> str:
        prompt, completion = data["prompt"], data["completion"]
        if isinstance(prompt, str) and isinstance(completion, str):
            return self.text_problem("prompt", prompt) or self.text_problem("completion", completion)
        names = self.called("prompt"), self.called("completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            problem = messages_problem(names[0], prompt) or messages_problem(names[1], completion)
            is_something = problem or any(map(says_something, completion))
            return problem or template_problem(data) or ("" if is_something else f"{names[1]!r} is empty")
        return f"{names[0]!r} and {names[1]!r} must both be strings, or both lists of messages"

    def to_example(self, data: dict[str, Any]) -> CompletionExample | ChatExample:
        prompt, completion = data["prompt"], data["completion"]
        if isinstance(prompt, str):
            return CompletionExample(prompt, completion)
        return chat_example([*prompt, *completion], data, prompt_messages=len(prompt))
