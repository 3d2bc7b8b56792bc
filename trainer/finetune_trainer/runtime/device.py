"""What this process runs on: device, attention kernels, seeds, process group."""

import importlib.util
import random
from typing import Any

import numpy as np
import structlog
import torch
from accelerate import PartialState

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.engine import attention as varlen
from finetune_trainer.engine import compilation, fp8
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning.planner import Device
from finetune_trainer.runtime.distributed import PATIENCE, least
from finetune_trainer.settings import World

log = structlog.get_logger(__name__)


def prepare(spec: FineTuneJobSpec, world: World) -> None:
    """Quiet the libraries, check that the GPUs asked for are there, seed. Raises ConfigInvalid."""
    from finetune_trainer.training.loop import quiet_libraries

    quiet_libraries()
    wanted = spec.resources.gpus_per_node
    found = torch.cuda.device_count()
    if wanted and not found:
        raise ConfigInvalid(
            f"spec.resources.gpusPerNode: {wanted}, but no GPU is visible to this process; set it to 0"
            " (--set resources.gpusPerNode=0) to train on the CPU"
        )
    if wanted:
        torch.cuda.set_device(world.local_rank)
    if world.size > 1:
        PartialState(cpu=not wanted, backend="nccl" if wanted else "gloo", timeout=PATIENCE)
    seed(spec.training.seed)


def seed(value: int) -> None:
    """Seed every generator that training draws from."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def device_name(spec: FineTuneJobSpec, world: World) -> str:
    """torch's name of this process's device."""
    return f"cuda:{world.local_rank}" if spec.resources.gpus_per_node else "cpu"


def device(spec: FineTuneJobSpec, world: World) -> Device:
    """This process's device, for the plan, which all must share: of several GPUs the memory of the smallest."""
    if not spec.resources.gpus_per_node:
        return Device("cpu")
    properties: Any = torch.cuda.get_device_properties(world.local_rank)
    return Device("cuda", properties.name, least(world, properties.total_memory))


def attention(spec: FineTuneJobSpec, base: BaseModel, world: World) -> str:
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


def _attention_problem(name: str, spec: FineTuneJobSpec, base: BaseModel, world: World) -> str | None:
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


def has_fp8(spec: FineTuneJobSpec, world: World) -> bool:
    """Whether the products asked for in FP8 can be computed so; where not, it is logged."""
    if spec.training.precision != "fp8":
        return False
    problem = _fp8_problem(spec, world)
    if problem:
        log.warning(f"training.precision: fp8 {problem}; going on with bf16")
    return problem is None


def _fp8_problem(spec: FineTuneJobSpec, world: World) -> str | None:
    if spec.lora.dora:
        return "does not go with DoRA"
    if not spec.resources.gpus_per_node:
        return "needs a GPU"
    if torch.cuda.get_device_capability(world.local_rank) < fp8.MIN_COMPUTE_CAPABILITY:
        return "needs a GPU of compute capability 8.9 or more (Ada, Hopper)"
    return fp8.self_check(device_name(spec, world))


def with_measured_memory(plan: ExecutionPlan) -> ExecutionPlan:
    """`plan` with the most GPU memory this process has held."""
    if not torch.cuda.is_initialized():
        return plan
    return plan.model_copy(update={"measured_peak_memory_bytes": torch.cuda.max_memory_allocated()})


def leave(world: World) -> None:
    """End the process group: from here rank 0 works alone."""
    if world.size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
