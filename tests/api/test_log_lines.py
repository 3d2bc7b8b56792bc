"""A log line for people: facts once, steps in columns, details when asked for."""

import pytest

from finetune_api.log_lines import readable

STEP = {"loss": "0.26", "learningRate": "0.000183717", "gradNorm": "0.1", "epoch": "2.5", "tokensPerSecond": "5531.4"}
PLACE = {"level": "info", "timestamp": "2026-01-01T12:03:11.5Z"}


def step(number: int, **changed: str) -> str:
    return readable({"event": f"Step {number}", **PLACE, **STEP, **changed}, details=False)


def test_the_numbers_of_steps_stand_below_each_other_within_80_columns() -> None:
    lines = [step(5, loss="3.42321", gradNorm="12.5", tokensPerSecond="38211.4"), step(12345)]
    assert lines[1] == "12:03:11  Step 12345  loss  0.2600  lr 1.84e-04  grad  0.100    5,531 tokens/s"
    assert max(map(len, lines)) <= 80
    for word in ("loss", "lr", "grad", "tokens/s"):
        assert lines[0].index(word) == lines[1].index(word)


@pytest.mark.parametrize("details", [False, True])
def test_an_event_says_its_facts_once(details: bool) -> None:
    entry = {**PLACE, "event": "Adapter attached: 32,768 trainable parameters", "trainable": 32768, "rank": 16}
    text = "12:03:11  Adapter attached: 32,768 trainable parameters"
    assert readable(entry, details=details) == text + ("  trainable=32768  rank=16" if details else "")


def test_what_a_warning_tells_is_always_shown() -> None:
    entry = {"event": "Old checkpoints could not be deleted", "level": "warning", "error": "denied"}
    assert readable(entry, details=False) == "warning: Old checkpoints could not be deleted  error=denied"


def test_an_evaluations_own_metrics_follow_and_traces_end_the_line() -> None:
    line = readable({"event": "Step 20", "evalLoss": "1.25", "accuracy": "0.5"}, details=False)
    assert line == "Step 20     eval loss  1.2500  accuracy 0.5"
    assert readable({"event": "x", "level": "error", "exception": "Traceback"}, details=False) == "error: x\nTraceback"
    assert readable({"event": "Step 3", "loss": "nan?"}, details=False) == "Step 3      loss nan?"
