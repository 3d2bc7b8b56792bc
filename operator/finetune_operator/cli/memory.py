"""Will a run fit the GPU? Asks the trainer's own sizing, which needs neither a GPU nor torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_operator.cli import text
from finetune_operator.cli.errors import CliError

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob

_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def parse_size(value: str) -> int:
    """Bytes of a Kubernetes quantity such as 24Gi or 80G ("GiB" and "GB" are understood too). Raises CliError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(|[kMGT]i?)B?", value.strip())
    if match is None or match[2] not in _UNITS or not float(match[1]):
        raise CliError(f"--gpu-memory: {value!r} is no size", hint="for example --gpu-memory 24Gi")
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True)
class Forecast:
    """What is known of GPU memory ahead of a run. `fits` is None where it cannot be told."""

    predicted_peak_bytes: int | None
    gpu_memory_bytes: int | None
    fits: bool | None
    micro_batch_size: int | None
    lines: tuple[str, ...]


def forecast(job: FineTuneJob, gpu_memory: int | None) -> Forecast:
    """Predict the peak GPU memory of `job`, and whether it fits `gpu_memory` bytes."""
    if not job.spec.resources.gpus_per_node:
        return _unknown(gpu_memory, "resources.gpusPerNode is 0: the run uses the CPU and no GPU memory.")
    try:
        from finetune_trainer import sizing
    except ImportError:
        return _unknown(gpu_memory, "Memory cannot be predicted here: this installation has no sizing model.")
    world = job.spec.resources.nodes * job.spec.resources.gpus_per_node
    device = sizing.Device("cuda", memory_bytes=gpu_memory or 0)
    try:
        plan = sizing.make_plan(job.spec, device, world, job.spec.model.attention)
    except Exception as error:
        # The trainer's refusals carry an exit code and are a sentence; anything else is a bug.
        if not hasattr(error, "exit_code"):
            raise
        return Forecast(None, gpu_memory, False, None, (f"Will not run: {error}",))
    peak = plan.predicted_peak_memory_bytes
    if peak is None:
        return _unknown(gpu_memory, "Memory is not predicted by this version: the trainer finds out as it starts.")
    need = f"{text.size(peak)} at the peak, per GPU, with micro-batch {plan.micro_batch_size}"
    if gpu_memory is None:
        return Forecast(
            peak, None, None, plan.micro_batch_size, (need, "Add --gpu-memory 24Gi to see whether it fits.")
        )
    fits = peak <= gpu_memory
    verdict = "fits" if fits else "does not fit"
    return Forecast(peak, gpu_memory, fits, plan.micro_batch_size, (f"{need}: {verdict} {text.size(gpu_memory)}",))


def _unknown(gpu_memory: int | None, why: str) -> Forecast:
    return Forecast(None, gpu_memory, None, None, (why,))
