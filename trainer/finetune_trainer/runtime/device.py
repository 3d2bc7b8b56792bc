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
from finetune_trainer.errors import ConfigInvalid, GpuUnavailable, first_line, is_gpu_out_of_memory
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


def start(spec: FineTuneJobSpec, ranks: Ranks, node: str) -> RuntimeDevice:
    """Quiet the libraries, check the GPUs that the spec asks for, join the process group, and seed.

    Use runtime.start.start_runtime, which imports this module when torch is needed.
    """
    quiet_libraries()
    wanted = spec.resources.gpus_per_node
    if wanted:
        _take_gpu(spec, ranks, node)
    if ranks.size > 1:
        PartialState(cpu=not wanted, backend="nccl" if wanted else "gloo", timeout=TIMEOUT)
    seed(spec.training.seed)
    return inspect_device(spec, ranks)


def _take_gpu(spec: FineTuneJobSpec, ranks: Ranks, node: str) -> None:
    """Make this rank's GPU the current one, and start CUDA on it."""
    found = 0
    try:
        found = torch.cuda.device_count()
        problem = f"only {found} of them are visible" if found else "no GPU is visible"
        if found > ranks.local_rank:
            torch.cuda.set_device(ranks.local_rank)
            torch.zeros(1, device="cuda")  # the driver may list a GPU that CUDA cannot use
            return
    except RuntimeError as error:
        if is_gpu_out_of_memory(error):
            raise
        problem = f"CUDA does not start: {first_line(error)[:300]}"
    wanted = f"spec.resources.gpusPerNode: {spec.resources.gpus_per_node}"
    if not node:
        advice = f"set it to {found}" if found else "set it to 0 (--set resources.gpusPerNode=0) to train on the CPU"
        raise ConfigInvalid(f"{wanted}, but {problem}; {advice}")
    if not torch.backends.cuda.is_built():
        raise ConfigInvalid(f"{wanted}, but the PyTorch of this image is built for CPUs; use an image built for GPUs")
    raise GpuUnavailable(
        f"{wanted}, but {problem} on node {node}; check its GPU driver and the device plugin for"
        f" {spec.resources.gpu_resource}"
    )


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
