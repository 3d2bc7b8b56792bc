"""Compile our own kernels while rows are tokenized: LLVM and ptxas leave the interpreter to the tokenizer."""

import importlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, Final

import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import attention, capabilities
from finetune_trainer.engine.attention import HOPPER
from finetune_trainer.model.base import BaseModel
from finetune_trainer.runtime.device import RuntimeDevice

_ROOM: Final = "finetune_trainer.engine.kernels."
#: One thread starts Triton's driver, which is compiled too; the others wait.
_DRIVER: Final = threading.Lock()
#: Tokens of the sequence that kernels are compiled with; they are the same for any number that has the same tiles.
_TOKENS: Final = 128


def compile_kernels_ahead(spec: FineTuneJobSpec, base: BaseModel, device: RuntimeDevice) -> ThreadPoolExecutor:
    """Begin to compile the kernels that are checked before they are used, each in a thread.

    Nothing is decided here: the checks find the kernels compiled. What fails fails there again, and is told there.
    No random number is drawn.

    Args:
        spec: The job's spec.
        base: The base model, whose heads the kernels are made for.
        device: This process's device.

    Returns:
        Who compiles; `shutdown` waits for all of it.
    """
    kernels = _kernels(spec, base, device)
    pool = ThreadPoolExecutor(max(1, len(kernels)), thread_name_prefix="compile-ahead")
    for call in kernels:
        pool.submit(_compile, call, device.torch_name)
    return pool


def _compile(call: Callable[[], Any], device: str) -> None:
    with suppress(Exception), torch.cuda.device(device):  # each thread has a current device of its own
        with _DRIVER:
            importlib.import_module("triton.runtime").driver.active.get_current_target()
        call()


def _kernels(spec: FineTuneJobSpec, base: BaseModel, device: RuntimeDevice) -> list[Callable[[], Any]]:
    """Return calls of the kernels that this run will check on `device`."""
    if device.kind != "cuda" or torch.cuda.get_device_capability(device.torch_name) != HOPPER:
        return []
    found: list[Callable[[], Any]] = []
    with suppress(ImportError):  # without triton
        if capabilities.checks_our_attention(spec, base, device):
            dtype = capabilities.half_precision(spec)
            kernels = importlib.import_module(_ROOM + "attention")
            made_for = {kernels.tiles(longest): longest for longest in (spec.training.max_length, _TOKENS)}
            for longest in made_for.values():
                found += _attention_kernels(kernels, base.config, device, dtype, longest)
        if spec.training.compile != "disabled":
            check = importlib.import_module(_ROOM + "lora").self_check
            found.append(partial(check, torch.device(device.torch_name)))
        if spec.training.precision == "fp8" and base.shape:
            kernels = importlib.import_module(_ROOM + "fp8")
            row = torch.zeros(1, base.shape.intermediate_size, dtype=torch.bfloat16, device=device.torch_name)
            found += [partial(kernels.round_gated, row, row), partial(kernels.round_gated_slopes, row, row, row)]
    return found


def _attention_kernels(
    kernels: Any, config: Any, device: RuntimeDevice, dtype: torch.dtype, longest: int
) -> list[Callable[[], Any]]:
    """Return a call of each kernel of `kernels`, engine.kernels.attention, for the heads of `config`."""
    heads, kv_heads, size = attention.heads(config)
    new = partial(torch.zeros, device=device.torch_name)
    query, key = new(_TOKENS, heads, size, dtype=dtype), new(_TOKENS, kv_heads, size, dtype=dtype)
    lse = new(heads, _TOKENS)
    rest = (torch.tensor([0, _TOKENS], dtype=torch.int32, device=device.torch_name), longest, size**-0.5)
    _, backward = kernels.backward_launches(query, query, key, key, query, lse, *rest)
    return [partial(kernels.attention, query, key, key, *rest), *backward]
