"""Every number goes to metrics.jsonl and to every sink; a sink's failure never ends a run."""

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from structlog.testing import capture_logs

from finetune_trainer.reporting.metrics_log import MetricsLog

NO_NUMBERS = {"nan": float("nan"), "infinite": float("inf"), "negative": float("-inf")}


def test_every_line_of_the_metrics_file_is_json(tmp_path: Path) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    file = tmp_path / "training/metrics.jsonl"
    metrics = MetricsLog(file, lambda step, values: None)
    metrics.log(1, {"loss": 0.5, "gradNorm": float("inf")} | NO_NUMBERS)
    metrics.log_baseline({"evalLoss": 2.0} | NO_NUMBERS)
    line, before = (json.loads(text, parse_constant=refuse) for text in file.read_text().splitlines())
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {"step": 1, "loss": 0.5}
    assert before == {"step": 0, "evalLossBefore": 2.0}


def test_sinks_get_what_the_file_gets_and_the_timing(tmp_path: Path) -> None:
    sent: list[tuple[int, Mapping[str, Any]]] = []
    metrics = MetricsLog(tmp_path / "metrics.jsonl", lambda step, values: sent.append((step, values)))
    metrics.log_baseline({"evalLoss": 2.0, "confusion.a.b": 3})
    metrics.log(10, {"loss": 1.5}, {"tokens": 4000, "secondsPerStep": None})
    metrics.log_final(10, {"evalLoss": 1.0})
    assert sent == [
        (0, {"evalLossBefore": 2.0}),
        (10, {"loss": 1.5, "tokens": 4000}),
        (10, {"final/evalLoss": 1.0}),
    ]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.keys() for line in lines] == [
        {"step", "evalLossBefore", "confusion.a.bBefore"},
        {"step", "time", "loss"},
    ]


def test_a_sink_that_fails_is_dropped_with_one_warning(tmp_path: Path) -> None:
    calls = []

    def fail(step: int, values: Mapping[str, Any]) -> None:
        calls.append(step)
        raise RuntimeError("no more")

    metrics = MetricsLog(tmp_path / "metrics.jsonl", fail)
    with capture_logs() as logs:
        metrics.log(1, {"loss": 1.0})
        metrics.log(2, {"loss": 0.9})
    assert calls == [1]
    assert [(line["event"], line["error"]) for line in logs] == [
        ("Prometheus failed; disabled for the rest of this run", "no more")
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
