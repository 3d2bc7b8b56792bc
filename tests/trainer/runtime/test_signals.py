"""One press of Ctrl-C stops once, however often it arrives; a second one is impatience."""

import signal

import pytest

from finetune_trainer.runtime import signals
from finetune_trainer.runtime.signals import StopFlag, stop_on_signals


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_a_press_that_arrives_twice_lets_a_checkpoint_be_saved() -> None:
    flag = StopFlag()
    with stop_on_signals(flag), flag.saving():
        press()
        press()
    assert flag.reason == "SIGINT"


def test_a_press_that_arrives_twice_is_told_once_where_nothing_can_be_saved() -> None:
    with stop_on_signals(StopFlag()):
        with pytest.raises(KeyboardInterrupt, match="Stopped by SIGINT with nothing to save"):
            press()
        press()


def test_a_second_press_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_PRESS_SECONDS", 0.0)
    flag = StopFlag()
    with stop_on_signals(flag), flag.saving():
        press()
        with pytest.raises(KeyboardInterrupt, match="a second Ctrl-C; the last saved checkpoint is intact"):
            press()


def test_ctrl_c_after_the_clusters_signal_stops_at_once() -> None:
    flag = StopFlag()
    with stop_on_signals(flag), flag.saving():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="a second Ctrl-C"):
            press()
