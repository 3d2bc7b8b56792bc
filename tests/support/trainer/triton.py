"""Triton kernels without a GPU."""

import importlib
import os
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import pytest
import torch


def interpreted(name: str, room: str = "engine.kernels") -> ModuleType:
    """The module `name` of engine/kernels, or another `room`, which Triton's interpreter runs (tests/conftest.py)."""
    pytest.importorskip("triton", reason="Triton exists for Linux alone")
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("a GPU is here, and tests/gpu runs the kernels on it")
    return importlib.import_module(f"finetune_trainer.{room}.{name}")


def interpreted_fp8(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """kernels.fp8 with what the interpreter lacks: a right cast to e4m3, and CUDA's functions. Half for bfloat16."""
    module = interpreted("fp8")
    tl = importlib.import_module("triton.language")
    types = {tl.float32: torch.float32, tl.float8e4nv: torch.float8_e4m3fn}

    def cast(values: Any, old: Any, new: Any, _: Any) -> Any:
        found = torch.from_numpy(numpy.array(values)).view(types[old]).to(types[new])
        return found.view(torch.uint8).numpy()

    monkeypatch.setattr("triton.runtime.interpreter._convert_float", cast)
    # Looked up as they are called: the interpreter puts its own in their places.
    functions = SimpleNamespace(fast_expf=lambda x: tl.exp(x), fast_dividef=lambda x, y: x / y)
    monkeypatch.setattr(module, "libdevice", functions)
    return module
