"""The base model is measured once for all jobs that share a cache and would measure the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.settings import Ranks
from finetune_trainer.training import baseline

SPEC = {
    "model": {"source": "hf://org/base"},
    "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/eval.jsonl"},
    "output": {"uri": "s3://adapters/a"},
}
METRICS = {"evalLoss": 1.5, "accuracy": 0.25}


def measure(cache: Path | None, evaluations: list[int], rank: int = 0, known: Any = None) -> dict[str, float]:
    context: Any = SimpleNamespace(
        spec=FineTuneJobSpec.model_validate(SPEC),
        ranks=Ranks(rank=rank, size=rank + 1),
        settings=SimpleNamespace(environment=SimpleNamespace(cache=cache)),
        on_rank_zero=lambda work: known if rank else work(),
    )
    base: Any = SimpleNamespace(tokenizer=None, new_tokens=SimpleNamespace(ids=()))
    evaluator: Any = SimpleNamespace(evaluate=lambda _: evaluations.append(rank) or METRICS)
    rows: Any = None
    return baseline.measured_or_kept(context, evaluator, None, ExecutionPlan(), base, rows, [])


@pytest.fixture
def _same(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    parts = {"weights": "a"}
    monkeypatch.setattr(baseline, "baseline_depends_on", lambda *_: dict(parts))
    return parts


def test_the_second_job_takes_what_the_first_has_measured(tmp_path: Path, _same: dict[str, Any]) -> None:
    evaluations: list[int] = []
    with structlog.testing.capture_logs() as lines:
        assert measure(tmp_path, evaluations) == measure(tmp_path, evaluations) == METRICS
    assert len(evaluations) == 1
    assert [line["event"] for line in lines] == [
        "An earlier job measured the same base model on the same rows, in the same way"
    ]
    _same["weights"] = "b"
    assert measure(tmp_path, evaluations) == METRICS
    assert len(evaluations) == 2


def test_without_a_cache_every_job_measures(_same: dict[str, Any]) -> None:
    evaluations: list[int] = []
    assert measure(None, evaluations) == measure(None, evaluations) == METRICS
    assert len(evaluations) == 2


def test_other_ranks_hear_of_it_from_the_first(tmp_path: Path, _same: dict[str, Any]) -> None:
    """What is in their own node's cache does not count, or one would wait for the others."""
    evaluations: list[int] = []
    assert measure(tmp_path, evaluations, rank=1, known=METRICS) == METRICS
    assert not evaluations
    assert measure(tmp_path, evaluations, rank=1) == METRICS
    assert evaluations == [1]
    assert not list(tmp_path.iterdir())
