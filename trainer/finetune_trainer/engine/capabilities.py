"""Which fast paths work on this GPU, with this model: attention, torch.compile, FP8."""

import importlib
import importlib.util
import os
import shutil

import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import attention as varlen
from finetune_trainer.engine import compilation, fp8
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.base import BaseModel
from finetune_trainer.runtime.device import device_name, log
from finetune_trainer.settings import Ranks


def attention(spec: FineTuneJobSpec, base: BaseModel, world: Ranks) -> str:
    """The attention implementation to use for `base`, by transformers' name; the choice is logged.

    Raises ConfigInvalid for one that was asked for and cannot run here.
    """
    varlen.register()
    wanted = spec.model.attention
    if wanted != "auto":
        problem = _attention_problem(wanted, spec, base, world)
        if problem:
            raise ConfigInvalid(f"spec.model.attention: {wanted} {problem}; take auto, sdpa or eager")
        log.info(f"Attention: {wanted} (as asked for)")
        return wanted
    why_not = {name: _attention_problem(name, spec, base, world) for name in ("flash_attention_2", varlen.NAME)}
    chosen = next((name for name, problem in why_not.items() if problem is None), "sdpa")
    problems = {name: problem for name, problem in why_not.items() if problem}
    log.info(f"Attention: {chosen} (the fastest that runs here)", **problems)
    return chosen


def _attention_problem(name: str, spec: FineTuneJobSpec, base: BaseModel, world: Ranks) -> str | None:
    """Why the implementation `name` cannot be used; None: it can."""
    if name in ("sdpa", "eager"):
        return None
    if not spec.resources.gpus_per_node:
        return "needs a GPU"
    if spec.training.precision == "fp32":
        return "computes in half precision, and training.precision is fp32"
    if name == "flash_attention_2":
        return None if importlib.util.find_spec("flash_attn") else "needs the flash-attn package"
    if not base.open_attention:
        return "cannot be put into this model: its code brings its own attention"
    if torch.cuda.get_device_capability(world.local_rank) < varlen.MIN_COMPUTE_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or more"
    dtype = torch.float16 if spec.training.precision == "fp16" else torch.bfloat16
    return varlen.why_not(base.config) or varlen.self_check(base.config, device_name(spec, world), dtype)


def can_compile(spec: FineTuneJobSpec) -> bool:
    """Whether what is compiled for this device can be compiled here; why not is logged."""
    problem = compilation.no_compiler() if spec.resources.gpus_per_node else None
    if problem and spec.training.compile != "disabled":
        log.warning(f"The decoder layers are not compiled: {problem}; training is slower")
    return problem is None


def has_fp8(spec: FineTuneJobSpec, world: Ranks) -> bool:
    """Whether the products asked for in FP8 can be computed so; where not, it is logged."""
    if spec.training.precision != "fp8":
        return False
    problem = _fp8_problem(spec, world)
    if problem:
        log.warning(f"training.precision: fp8 {problem}; going on with bf16")
    return problem is None


def _fp8_problem(spec: FineTuneJobSpec, world: Ranks) -> str | None:
    if spec.lora.dora:
        return "does not go with DoRA"
    if not spec.resources.gpus_per_node:
        return "needs a GPU"
    if torch.cuda.get_device_capability(world.local_rank) < fp8.MIN_COMPUTE_CAPABILITY:
        return "needs a GPU of compute capability 8.9 or more (Ada, Hopper)"
    return fp8.self_check(device_name(spec, world))


def no_compiler() -> str | None:
    """Why nothing can be compiled for a GPU on this machine; None: it can."""
    if not importlib.util.find_spec("triton"):
        return "the triton package is missing"
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "clang")):
        return "no C compiler is installed"
    return None
