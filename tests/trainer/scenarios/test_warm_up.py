"""A warm-up leaves in the cache what the job needs, and nothing at its output."""

from pathlib import Path
from typing import Any

from support.trainer.process import job, train


def test_it_fills_the_cache_and_trains_nothing(tiny_model: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"evaluation.metrics": ["loss", "nli"], "evaluation.generation": {"maxNewTokens": 4}}
    cache = {"FINETUNE_CACHE_DIR": str(tmp_path / "cache")}
    config = job(tmp_path, tiny_model, changes)
    warmed = train(config, tmp_path, env=cache, arguments=("--warm-up",))
    assert warmed.exit_code == 0, warmed.log
    assert warmed.message == f"{tmp_path / 'cache'} holds what this job needs; nothing was trained"
    assert not (tmp_path / "out/manifest.json").exists()
    assert len(list((tmp_path / "cache/evaluations").iterdir())) == 1
    job(tmp_path, tiny_model, changes | {"training.maxSteps": 1})
    finished = train(config, tmp_path, env=cache)
    assert finished.exit_code == 0, finished.log
    assert "An earlier job measured the same base model on the same rows" in finished.log
    assert finished.report["metrics"]["evalLossBefore"] == warmed.report["metrics"]["evalLossBefore"]
