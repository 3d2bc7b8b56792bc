"""Which held-out rows are answered, and how their prompts reach the model."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_evaluation import Evaluation
from finetune_api.status import ExecutionPlan
from finetune_trainer.data import formats
from finetune_trainer.data.dataset import TokenizedDataset
from finetune_trainer.data.rows import Row
from finetune_trainer.engine import attention
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.errors import DatasetInvalid
from finetune_trainer.evaluation.evaluator import EvalPrompt, Evaluator, eval_prompts
from finetune_trainer.methods import METHODS
from finetune_trainer.settings import Ranks
from support.trainer.random_models import build, prompts
from support.trainer.varlen import as_in_2_13


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


@pytest.mark.parametrize("packed", [True, False])
def test_prompts_are_packed_where_rows_are(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole evaluation no token of padding is computed then, of the rows or of the prompts."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    attention.register()
    model, ids = build("mistral"), prompts(5)
    patch_fused_loss(model.get_base_model())
    model.set_attn_implementation(attention.NAME)
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"source": "file:///model"},
            "dataset": {"train": "file:///train.jsonl", "eval": "file:///eval.jsonl"},
            "output": {"uri": "file:///out"},
            "training": {"precision": "fp32"},
            "evaluation": {"metrics": ["loss", "nli"], "generation": {"maxNewTokens": 4}},
        }
    )
    plan = ExecutionPlan(micro_batch_size=8, packing=packed, attention=attention.NAME)
    tokenizer: Any = SimpleNamespace(
        pad_token_id=0, eos_token_id=2, decode=str, batch_decode=lambda rows, **_: [str(row) for row in rows]
    )
    rows = TokenizedDataset()
    for each in ids:
        rows.input_ids.append(each)
        rows.labels.append(each)
    asked = [EvalPrompt(each, "1", number, "") for number, each in enumerate(ids)]
    shapes: list[torch.Size] = []
    body = model.get_base_model().model
    body.register_forward_pre_hook(lambda _, args, inputs: shapes.append(inputs["input_ids"].shape), with_kwargs=True)
    metrics = Evaluator(spec, METHODS["sft"], plan, tokenizer, Ranks(), rows, asked).evaluate(model)
    assert {"evalLoss", "accuracy"} <= metrics.keys()
    longest, total = max(map(len, ids)), sum(map(len, ids))
    assert [tuple(shape) for shape in shapes[:2]] == [(1, total) if packed else (5, longest)] * 2
