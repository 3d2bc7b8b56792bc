"""Which held-out rows are answered."""

from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.spec_evaluation import Evaluation
from finetune_trainer.data import formats
from finetune_trainer.data.rows import Row
from finetune_trainer.errors import DatasetInvalid
from finetune_trainer.evaluation.evaluator import eval_prompts


def test_a_held_out_row_without_a_token_before_its_answer_is_refused() -> None:
    """With a tokenizer that begins no text with a token of its own, nothing is left to continue."""
    data = [{"prompt": "is it?", "completion": '{"label": 1}'}, {"prompt": "", "completion": '{"label": 0}'}]
    found = formats.detect(data[0])
    assert not isinstance(found, str)

    class Held(list[Row]):
        format = found

    encoder: Any = SimpleNamespace(prompt=lambda text: [ord(each) for each in text])
    evaluation = Evaluation.model_validate({"metrics": ["loss", "nli"], "generation": {"labelKey": "label"}})
    rows: Any = Held(Row("eval.jsonl", line + 1, each) for line, each in enumerate(data))
    with pytest.raises(DatasetInvalid, match=r"^eval\.jsonl:2: its prompt has no token, and the model answers by"):
        eval_prompts(rows, encoder, evaluation)
    assert [each.label for each in eval_prompts(Held(rows[:1]), encoder, evaluation)] == ["1"]
