"""What this process runs on: device, attention kernels, seeds, process group."""

import os
import random
from typing import Any

import numpy as np
import structlog
import torch
from accelerate import PartialState

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.planning.planner import Device
from finetune_trainer.runtime.distributed import TIMEOUT, all_reduce_min
from finetune_trainer.settings import Ranks

log = structlog.get_logger(__name__)


def prepare(spec: FineTuneJobSpec, world: Ranks) -> None:
    """Quiet the libraries, check that the GPUs asked for are there, seed. Raises ConfigInvalid."""
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
        PartialState(cpu=not wanted, backend="nccl" if wanted else "gloo", timeout=TIMEOUT)
    seed(spec.training.seed)


def seed(value: int) -> None:
    """Seed every generator that training draws from."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def device_name(spec: FineTuneJobSpec, world: Ranks) -> str:
    """torch's name of this process's device."""
    return f"cuda:{world.local_rank}" if spec.resources.gpus_per_node else "cpu"


def device(spec: FineTuneJobSpec, world: Ranks) -> Device:
    """This process's device, for the plan, which all must share: of several GPUs the memory of the smallest."""
    if not spec.resources.gpus_per_node:
        return Device("cpu")
    properties: Any = torch.cuda.get_device_properties(world.local_rank)
    return Device("cuda", properties.name, all_reduce_min(world, properties.total_memory))


def with_measured_memory(plan: ExecutionPlan) -> ExecutionPlan:
    """`plan` with the most GPU memory this process has held."""
    if not torch.cuda.is_initialized():
        return plan
    return plan.model_copy(update={"measured_peak_memory_bytes": torch.cuda.max_memory_allocated()})


def leave(world: Ranks) -> None:
    """End the process group: from here rank 0 works alone."""
    if world.size > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def quiet_libraries() -> None:
    """No progress bars and no advice from the libraries on our console; no telemetry."""
    import datasets
    import transformers

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
