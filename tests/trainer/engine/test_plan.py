"""A plan that the loaded model does not bear out is made anew, or refused where the spec demands it."""

from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.plan import prove_plan
from finetune_trainer.engine.proof import Findings
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.settings import Ranks
from support.trainer import families
from support.trainer.varlen import base_of

ROWS = [[5, 9, 77, 31, 8, 100, 64, 12, 90, 33, 7, 21, 55, 10, 3, 88, 40, 17, 66, 29, 71, 4, 19, 52, 101, 60, 13, 37]]


def _prove(kind: str, tiny: Any, packing: str) -> tuple[ExecutionPlan, list[Findings]]:
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base"},
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out"},
            "training": {"precision": "fp32", "packing": packing},
        }
    )
    asked: list[Findings] = []

    def replan(findings: Findings) -> ExecutionPlan:
        asked.append(findings)
        return ExecutionPlan(attention=findings.attention, packing=False)

    base = base_of(tiny)
    object.__setattr__(base, "tokenizer", type("Tokenizer", (), {"pad_token_id": 0}))
    plan = ExecutionPlan(attention="sdpa", packing=packing != "disabled")
    return prove_plan(families.tiny_model(kind), plan, spec, base, Ranks(), ROWS, replan), asked


def test_a_plan_that_holds_stays(tiny_model: Any) -> None:
    plan, asked = _prove("llama", tiny_model, "auto")
    assert plan.packing
    assert not asked


def test_rows_that_see_each_other_are_padded_and_the_log_says_why(
    tiny_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, asked = _prove("falcon", tiny_model, "auto")
    assert not plan.packing
    assert asked[0].packing_problem
    assert "Rows are padded, not packed: rows laid end to end see each other in this model" in capsys.readouterr().out


def test_packing_that_was_demanded_is_refused(tiny_model: Any) -> None:
    with pytest.raises(ConfigInvalid, match=r"spec.training.packing: enabled, but rows .* take auto or disabled"):
        _prove("falcon", tiny_model, "enabled")


def test_padded_rows_need_no_proof_of_packing(tiny_model: Any) -> None:
    plan, asked = _prove("falcon", tiny_model, "disabled")
    assert not plan.packing
    assert not asked
