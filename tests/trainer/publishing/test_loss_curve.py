"""The loss curve begins with the base model, and has the accuracy where it was measured."""

from pathlib import Path

import pytest

from finetune_trainer.publishing.loss_curve import plot_loss, points

LINES = [
    {"step": 0, "evalLossBefore": 3.7, "accuracyBefore": 0.0},
    {"step": 5, "loss": 3.0},
    {"step": 10, "loss": 2.0},
    {"step": 10, "evalLoss": 1.5, "accuracy": 0.5},
    {"step": 10, "loss": 2.1},
]


def test_the_base_is_step_0_and_a_step_done_again_counts_once() -> None:
    assert points(LINES, "evalLoss") == [(0, 3.7), (10, 1.5)]
    assert points(LINES, "accuracy") == [(0, 0.0), (10, 0.5)]
    assert points(LINES, "loss") == [(5, 3.0), (10, 2.1)]


@pytest.mark.parametrize("lines", [LINES, LINES[1:3], LINES[:1], []])
def test_whatever_was_measured_is_drawn(lines: list[dict[str, float]], tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        plot_loss(lines, tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
