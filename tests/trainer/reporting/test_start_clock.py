"""The log says once where the time before the first step went."""

import time

import pytest
import structlog

from finetune_trainer.reporting import start_clock
from finetune_trainer.reporting.start_clock import StartClock, process_began


def test_parts_add_up_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 5.0, 9.0, 9.5, 10.0])
    monkeypatch.setattr(start_clock, "process_began", lambda: 1.0)
    monkeypatch.setattr(start_clock.time, "monotonic", lambda: next(times))
    clock = StartClock()
    for part in ("load", "compile", "load"):
        clock.lap(part)
    with structlog.testing.capture_logs() as lines:
        clock.tell()
    assert clock.told
    assert lines == [
        {
            "event": "The first step is done, 9.0 s after the process began",
            "log_level": "info",
            "process": 2.0,
            "load": 2.5,
            "compile": 4.0,
            "first_step": 0.5,
        }
    ]


def test_a_process_began_before_its_code_ran() -> None:
    assert process_began() < time.monotonic()
