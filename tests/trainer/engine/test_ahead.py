"""Kernels are compiled while rows are tokenized, and nothing else comes of it."""

import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import ahead, attention
from finetune_trainer.runtime.device import RuntimeDevice
from finetune_trainer.runtime.rng import RngState
from support.trainer.triton import interpreted
from support.trainer.varlen import base_of, simulate_a_gpu

#: A GPU for the decisions, whose tensors lie in host memory.
GPU = RuntimeDevice("cuda", torch_name="cpu")


def _spec(**training: Any) -> FineTuneJobSpec:
    wanted = training.pop("attention", "auto")
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/base", "attention": wanted},
            "dataset": {"train": "s3://data/x"},
            "output": {"uri": "s3://data/out"},
            "training": training,
        }
    )


@pytest.mark.parametrize(
    ("spec", "device", "capability", "ours", "count"),
    [
        (_spec(), GPU, (9, 0), True, 4),
        (_spec(attention="varlen", compile="disabled"), GPU, (9, 0), True, 3),
        (_spec(attention="sdpa"), GPU, (9, 0), True, 1),
        (_spec(precision="fp32"), GPU, (9, 0), True, 1),
        (_spec(precision="fp8"), GPU, (9, 0), True, 6),
        (_spec(), GPU, (9, 0), False, 1),
        (_spec(), GPU, (8, 0), True, 0),
        (_spec(), RuntimeDevice("cpu"), (9, 0), True, 0),
    ],
)
def test_those_are_compiled_that_will_be_checked(
    spec: FineTuneJobSpec, device: RuntimeDevice, capability: tuple[int, int], ours: bool, count: int,
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    interpreted("attention")
    simulate_a_gpu(monkeypatch, capability)
    monkeypatch.setattr(attention, "ours_are_faster", lambda config, device: ours)
    monkeypatch.setattr(ahead, "_TOKENS", 16)
    before = RngState.now()
    calls = ahead._kernels(spec, base_of(tiny_model), device)
    assert len(calls) == count
    if count == 3:
        for call in calls:
            call()
    assert RngState.now().same(before)


def test_without_triton_nothing_is(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_a_gpu(monkeypatch)
    monkeypatch.setattr(attention, "ours_are_faster", lambda config, device: True)
    for name in ("attention", "lora"):
        monkeypatch.setitem(sys.modules, f"finetune_trainer.engine.kernels.{name}", None)
    assert ahead._kernels(_spec(), base_of(tiny_model), GPU) == []


def test_a_kernel_that_fails_stops_neither_the_run_nor_the_others(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[Any] = []
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: None))
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=driver))
    monkeypatch.setattr(torch.cuda, "device", lambda name: nullcontext())

    def broken() -> None:
        threads.append(threading.current_thread())
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(ahead, "_kernels", lambda *_: [broken, lambda: threads.append(threading.current_thread())])
    ahead.compile_kernels_ahead(_spec(), base_of(tiny_model), GPU).shutdown()
    assert len(threads) == 2
    assert threading.current_thread() not in threads
