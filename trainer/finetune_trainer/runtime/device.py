"""The device of this process, and the libraries that use it."""

import random
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.planning.device import Device
from finetune_trainer.runtime.distributed import TIMEOUT, all_reduce_min
from finetune_trainer.settings import Ranks


@dataclass(frozen=True)
class RuntimeDevice(Device):
    """This process's device, for the plan, which all ranks share: `memory_bytes` is that of the smallest GPU.

    Attributes:
        torch_name: torch's name of the device: "cpu" or "cuda:<local rank>".
    """

    torch_name: str = "cpu"


def start(spec: FineTuneJobSpec, ranks: Ranks) -> RuntimeDevice:
    """Quiet the libraries, check the GPUs that the spec asks for, join the process group, and seed.

    Use runtime.start.start_runtime, which also sets the environment that must be set before torch is imported.
    """
    quiet_libraries()
    wanted = spec.resources.gpus_per_node
    found = torch.cuda.device_count()
    if wanted and not found:
        raise ConfigInvalid(
            f"spec.resources.gpusPerNode: {wanted}, but no GPU is visible to this process; set it to 0"
            " (--set resources.gpusPerNode=0) to train on the CPU"
        )
    if wanted:
        torch.cuda.set_device(ranks.local_rank)
    if ranks.size > 1:
        PartialState(cpu=not wanted, backend="nccl" if wanted else "gloo", timeout=TIMEOUT)
    seed(spec.training.seed)
    return inspect_device(spec, ranks)


def inspect_device(spec: FineTuneJobSpec, ranks: Ranks) -> RuntimeDevice:
    """Describe this process's device. With several ranks this is a collective."""
    if not spec.resources.gpus_per_node:
        return RuntimeDevice("cpu")
    properties: Any = torch.cuda.get_device_properties(ranks.local_rank)
    memory = all_reduce_min(ranks, properties.total_memory)
    return RuntimeDevice("cuda", properties.name, memory, torch_name=f"cuda:{ranks.local_rank}")


def seed(value: int) -> None:
    """Seed every generator that training draws from."""
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def quiet_libraries() -> None:
    """Turn off progress bars and advice of the libraries."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
