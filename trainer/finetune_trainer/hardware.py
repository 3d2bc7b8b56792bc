"""What this process runs on: device, attention kernels, seeds, process group."""

import importlib.util
import random
from typing import Any

import numpy as np
import structlog
import torch
from accelerate import PartialState
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.config import World
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.processes import PATIENCE
from finetune_trainer.sizing import Device

log = structlog.get_logger(__name__)


def prepare(spec: FineTuneJobSpec, world: World) -> None:
    """Quiet the libraries, check that the GPUs asked for are there, seed. Raises ConfigInvalid."""
    from finetune_trainer.sft import quiet_libraries

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
    """This process's device, for the plan."""
    if not spec.resources.gpus_per_node:
        return Device("cpu")
    properties: Any = torch.cuda.get_device_properties(world.local_rank)
    return Device("cuda", properties.name, properties.total_memory)


def attention(spec: FineTuneJobSpec) -> str:
    """The attention implementation to use, by transformers' name. Raises ConfigInvalid for one that cannot run here."""
    wanted, on_gpu = spec.model.attention, bool(spec.resources.gpus_per_node)
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if wanted in ("flash_attention_2", "varlen") and not on_gpu:
        raise ConfigInvalid(f"spec.model.attention: {wanted} needs a GPU; take auto, sdpa or eager")
    if wanted == "flash_attention_2" and not has_flash:
        raise ConfigInvalid("spec.model.attention: flash_attention_2 needs the flash-attn package; take auto or sdpa")
    if wanted == "varlen" and "varlen" not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        raise ConfigInvalid("spec.model.attention: varlen is not built into this trainer; take auto or sdpa")
    if wanted != "auto":
        return wanted
    chosen = "flash_attention_2" if on_gpu and has_flash else "sdpa"
    log.info(f"Attention: {chosen} (the fastest installed here)")
    return chosen


def with_measured_memory(plan: ExecutionPlan) -> ExecutionPlan:
    """`plan` with the most GPU memory this process has held."""
    if not torch.cuda.is_initialized():
        return plan
    return plan.model_copy(update={"measured_peak_memory_bytes": torch.cuda.max_memory_allocated()})


def leave(world: World) -> None:
    """End the process group: from here rank 0 works alone."""
    if world.size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
