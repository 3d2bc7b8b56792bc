"""Triton kernels without a GPU."""

import importlib
import os
from types import ModuleType

import pytest


def interpreted(name: str, room: str = "engine.kernels") -> ModuleType:
    """The module `name` of engine/kernels, or another `room`, which Triton's interpreter runs (tests/conftest.py)."""
    pytest.importorskip("triton", reason="Triton exists for Linux alone")
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("a GPU is here, and tests/gpu runs the kernels on it")
    return importlib.import_module(f"finetune_trainer.{room}.{name}")
