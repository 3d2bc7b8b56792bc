"""Numbers as people read them, and the loss history."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from finetune_cli.commands import logs
from finetune_cli.output import formatting, loss_history


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (45, "45 s"),
        (192, "3 min 12 s"),
        (180, "3 min"),
        (2520, "42 min"),
        (7500, "2 h 5 min"),
        (300_000, "3 d 11 h"),
    ],
)
def test_durations(seconds, words):
    assert formatting.duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.42134, "0.4213"), (2e-5, "2e-05"), (18004.4, "18,004"), (2.0, "2"), (0.0, "0"), (12.345, "12.35")],
)
def test_numbers(value, words):
    assert formatting.number(value) == words


def test_sizes_and_shares_and_ages():
    assert [formatting.size(count) for count in (512, 27_300_000, 3 * 2**30)] == ["512 B", "26.0 MiB", "3.0 GiB"]
    assert [formatting.percent(share) for share in (0, 0.005, 0.48, 0.995, 1)] == [
        "0 %",
        "0.5 %",
        "48 %",
        "99.5 %",
        "100 %",
    ]
    now = datetime.now(UTC)
    assert [formatting.age(now - timedelta(seconds=s), now) for s in (45, 119, 120, 7200, 180_000)] == [
        "45s",
        "119s",
        "2m",
        "2h",
        "2d",
    ]


def test_a_sparkline_spans_its_values_and_never_its_width():
    assert formatting.sparkline([1, 2, 3, 4, 5, 6, 7, 8], 8) == "▁▂▃▄▅▆▇█"
    assert formatting.sparkline([5, 5, 5], 8) == "▁▁▁"
    assert len(formatting.sparkline(list(range(1000)), 40)) == 40
    assert formatting.sparkline([1, float("nan"), float("inf"), 2], 8) == "▁█"
    assert formatting.sparkline([], 8) == ""


def test_losses_are_read_from_logs_and_metrics_alike():
    metrics = [json.dumps({"step": s, "loss": 3 - s / 10}) for s in (10, 20)]
    log = [json.dumps({"event": f"Step {s}", "loss": f"{3 - s / 10:.6g}", "level": "info"}) for s in (10, 20)]
    assert loss_history.losses(metrics) == loss_history.losses(log) == [2.0, 1.0]
    noise = ["not JSON", "{broken", "[1]", json.dumps({"event": "Step 5"}), json.dumps({"step": 7, "evalLoss": 1.0})]
    assert loss_history.losses(noise) == []


def test_a_step_done_again_after_a_resume_counts_once():
    lines = [json.dumps({"step": step, "loss": loss}) for step, loss in ((1, 3.0), (2, 2.0), (1, 2.5), (3, 1.0))]
    assert loss_history.losses(lines) == [2.5, 2.0, 1.0]


def test_json_log_lines_are_shown_for_people_and_others_as_they_are():
    line = json.dumps({"event": "Step 10", "loss": "0.5", "level": "info", "timestamp": "2026-01-01T12:03:11.5Z"})
    assert logs.readable(line) == ("12:03:11  Step 10     loss  0.5000", "")
    assert logs.readable(json.dumps({"event": "careful", "level": "warning"})) == ("warning: careful", "yellow")
    assert logs.readable("Traceback (most recent call last):") == ("Traceback (most recent call last):", "")
    assert logs.readable('{"half": ') == ('{"half": ', "")
