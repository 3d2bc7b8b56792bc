"""What is begun early changes nothing: it is there sooner, or it fails again where it is needed."""

import importlib
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_trainer.runtime import early
from finetune_trainer.runtime.early import begin, hash_compilers


def test_what_fails_in_a_thread_is_told_by_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []

    def fail() -> None:
        done.append(1)
        raise OSError("libcuda.so.1: cannot open shared object file")

    begin(fail).join(10)
    assert done
    assert capfd.readouterr() == ("", "")


def test_a_process_without_room_for_a_thread_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    assert not begin(lambda: None).is_alive()


def test_torch_and_triton_are_hashed_once_they_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = []
    for number, (module, name) in enumerate(early._KEYS.items()):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{name: lambda number=number: hashed.append(number)}))
    for thread in hash_compilers():
        thread.join(10)
    assert sorted(hashed) == [0, 1]
    for module in early._KEYS:
        monkeypatch.delitem(sys.modules, module)
    assert not hash_compilers(), "nothing is imported for it: main threads may be importing the same"


@pytest.mark.parametrize("module", early._KEYS)
def test_the_installed_torch_keeps_the_keys_that_it_looks_for(module: str) -> None:
    key = getattr(importlib.import_module(module), early._KEYS[module])
    assert key() is key()
