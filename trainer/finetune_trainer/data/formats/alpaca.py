"""Alpaca: an instruction, perhaps with an input, and the output to learn."""

from typing import Any, Final

from finetune_trainer.data.row_format import CompletionExample, RowFormat

#: https://github.com/tatsu-lab/stanford_alpaca#data-release
_WITH_INPUT: Final = (
    "Below is an instruction that describes a task, paired with an input that provides further context."
    " Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_WITHOUT_INPUT: Final = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


class AlpacaFormat(RowFormat):
    """Rows whose output is learned after the prompt that Alpaca was trained with."""

    name = "alpaca"
    columns = ("instruction", "output")
    optional = ("input",)

    def check(self, data: dict[str, Any]) -> str:
        problem = self.text_problem("instruction", data["instruction"]) or self.text_problem("output", data["output"])
        given = data.get("input")
        if problem or given is None or isinstance(given, str):
            return problem
        return self.text_problem("input", given)

    def to_example(self, data: dict[str, Any]) -> CompletionExample:
        given = data.get("input") or ""
        template = _WITH_INPUT if given.strip() else _WITHOUT_INPUT
        return CompletionExample(template.format(instruction=data["instruction"], input=given), data["output"])
