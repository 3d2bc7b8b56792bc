"""Which fast paths work on this GPU, with this model: attention, torch.compile, FP8."""

import importlib.util
import os
import shutil

import structlog
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.engine import attention, fp8
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.base import BaseModel
from finetune_trainer.runtime.device import RuntimeDevice

log = structlog.get_logger(__name__)


def choose_attention(spec: FineTuneJobSpec, base: BaseModel, device: RuntimeDevice) -> str:
    """Return the attention implementation to use for `base`, by transformers' name; log the choice.

    Raises:
        ConfigInvalid: When the one that was asked for cannot run here.
    """
    attention.register()
    wanted = spec.model.attention
    if wanted != "auto":
        reason = _attention_unsupported(wanted, spec, base, device)
        if reason:
            others = "auto, sdpa or eager" if base.attention == "sdpa" else "auto or eager"
            raise ConfigInvalid(f"spec.model.attention: {wanted} {reason}; take {others}")
        log.info(f"Attention: {wanted} (as asked for)")
        return wanted
    reasons = {name: _attention_unsupported(name, spec, base, device) for name in ("flash_attention_2", attention.NAME)}
    chosen = next((name for name, reason in reasons.items() if reason is None), base.attention)
    log.info(
        f"Attention: {chosen} (the fastest that runs here)",
        **{name: reason for name, reason in reasons.items() if reason},
    )
    return chosen


def _attention_unsupported(name: str, spec: FineTuneJobSpec, base: BaseModel, device: RuntimeDevice) -> str | None:
    """Return why the implementation `name` cannot be used, None if it can."""
    reason = _attention_excluded(name, spec, base, device)
    if reason or name != attention.NAME:
        return reason
    return attention.self_check(base.config, device.torch_name, half_precision(spec), spec.training.max_length)


def _attention_excluded(name: str, spec: FineTuneJobSpec, base: BaseModel, device: RuntimeDevice) -> str | None:
    """Return why the implementation `name` is not even tried, None if it is."""
    if name in ("sdpa", "eager"):
        return base.attention_problem(name, spec)
    if not spec.resources.gpus_per_node:
        return "needs a GPU"
    if spec.training.precision == "fp32":
        return "computes in half precision, and training.precision is fp32"
    if name == "flash_attention_2":
        installed = importlib.util.find_spec("flash_attn")
        return base.attention_problem(name, spec) if installed else "needs the flash-attn package"
    if not base.open_attention:
        return "cannot be put into this model: its code brings its own attention"
    if torch.cuda.get_device_capability(device.torch_name) < attention.MIN_COMPUTE_CAPABILITY:
        return "needs a GPU of compute capability 8.0 or more"
    return attention.unsupported_reason(base.config)


def checks_our_attention(spec: FineTuneJobSpec, base: BaseModel, device: RuntimeDevice) -> bool:
    """Return whether `choose_attention` will check our own kernels of attention."""
    if spec.model.attention not in ("auto", attention.NAME):
        return False
    excluded = _attention_excluded(attention.NAME, spec, base, device)
    return excluded is None and attention.ours_are_faster(base.config, device.torch_name)


def half_precision(spec: FineTuneJobSpec) -> torch.dtype:
    """Return the type that attention computes in."""
    return torch.float16 if spec.training.precision == "fp16" else torch.bfloat16


def can_compile(spec: FineTuneJobSpec) -> bool:
    """Return whether torch.compile works here; log why not."""
    reason = no_compiler() if spec.resources.gpus_per_node else None
    if reason and spec.training.compile != "disabled":
        log.warning(f"The decoder layers are not compiled: {reason}; training is slower")
    return reason is None


def no_compiler() -> str | None:
    """Return why nothing can be compiled for a GPU on this machine, None if it can."""
    if not importlib.util.find_spec("triton"):
        return "the triton package is missing"
    if not any(shutil.which(name) for name in (os.environ.get("CC") or "gcc", "clang")):
        return "no C compiler is installed"
    return None


def has_fp8(spec: FineTuneJobSpec, device: RuntimeDevice) -> bool:
    """Return whether the products that the spec asks for in FP8 can be computed so; log why not."""
    if spec.training.precision != "fp8":
        return False
    reason = _fp8_unsupported(spec, device)
    if reason:
        log.warning(f"training.precision: fp8 {reason}; using bf16 instead")
    return reason is None


def _fp8_unsupported(spec: FineTuneJobSpec, device: RuntimeDevice) -> str | None:
    if spec.lora.dora:
        return "does not go with DoRA"
    if not spec.resources.gpus_per_node:
        return "needs a GPU"
    if torch.cuda.get_device_capability(device.torch_name) < fp8.MIN_COMPUTE_CAPABILITY:
        return "needs a GPU of compute capability 8.9 or more (Ada, Hopper)"
    return fp8.self_check(device.torch_name)
