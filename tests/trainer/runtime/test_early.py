"""What is begun early changes nothing: it is there sooner, or it fails again where it is needed."""

import ctypes
import importlib
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_trainer.runtime import early
from finetune_trainer.runtime.early import begin, hash_compilers, open_gpu


class Driver:
    """CUDA's driver, with two GPUs, or with none and an error."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.calls: list[Any] = []

    def cuInit(self, flags: int) -> int:
        self.calls.append(("init", flags))
        return self.error

    def cuDeviceGet(self, device: Any, index: int) -> int:
        self.calls.append(("device", index))
        device._obj.value = 7 + index
        return 0 if index < 2 else 101

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        self.calls.append(("context", device.value))
        return 0


@pytest.mark.parametrize(
    ("driver", "index", "calls"),
    [
        pytest.param(Driver(), 1, [("init", 0), ("device", 1), ("context", 8)], id="the GPU of this rank"),
        pytest.param(Driver(), 2, [("init", 0), ("device", 2)], id="fewer GPUs than ranks"),
        pytest.param(Driver(error=100), 0, [("init", 0)], id="no GPU"),
    ],
)
def test_the_driver_opens_the_gpu_of_this_rank_alone(
    driver: Driver, index: int, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": driver}.__getitem__)
    open_gpu(index)
    assert driver.calls == calls


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
