"""Tokens and seconds of training alone."""

import pytest

from finetune_trainer.training import throughput
from finetune_trainer.training.throughput import Throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "monotonic", lambda: now[0])
    return now


def test_pauses_do_not_count_and_an_interval_begins_where_the_last_ended(clock: list[float]) -> None:
    measured = Throughput()
    measured.start()
    measured.tokens, measured.steps, clock[0] = 100, 1, 2.0
    with measured.paused():
        clock[0] = 50.0
    clock[0] = 51.0
    assert measured.interval() == (100, 3.0, 1)
    measured.tokens += 10
    clock[0] = 52.0
    assert measured.interval() == (10, 1.0, 0)


def test_a_step_that_was_abandoned_leaves_no_trace(clock: list[float]) -> None:
    measured = Throughput()
    measured.start()
    measured.tokens, clock[0] = 100, 2.0
    measured.snapshot()
    measured.tokens, clock[0] = 150, 9.0
    measured.rewind()
    assert (measured.tokens, measured.seconds) == (100, 2.0)


def test_a_pause_of_a_stopped_clock_does_not_start_it(clock: list[float]) -> None:
    measured = Throughput()
    with measured.paused():
        clock[0] = 5.0
    clock[0] = 9.0
    assert measured.interval() == (0, 0.0, 0)
