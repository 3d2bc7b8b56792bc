"""Predict how long a training step takes on a GPU that is known by name. Pure, importable without torch."""

import re
from typing import Final

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.planning.cost import cost
from finetune_trainer.planning.memory import Layout
from finetune_trainer.planning.model_shape import ModelShape

#: Dense products in bfloat16, in teraflops, as their makers say. A name may be part of another: the longest counts.
TERAFLOPS: Final = {
    "A10": 125,
    "A10G": 70,
    "A100": 312,
    "B200": 2250,
    "GH200": 989,
    "H100": 989,
    "H100 NVL": 835,
    "H100 PCIE": 756,
    "H200": 989,
    "L4": 121,
    "L40S": 362,
    "RTX 3090": 71,
    "RTX 4090": 165,
}
#: GiB that drivers report of them.
MEMORY_GIB: Final = {
    "A10": 22.0,
    "A10G": 22.0,
    "A100": 79.2,
    "B200": 178.3,
    "GH200": 94.5,
    "H100": 79.1,
    "H100 NVL": 93.1,
    "H100 PCIE": 79.1,
    "H200": 139.8,
    "L4": 22.0,
    "L40S": 44.4,
    "RTX 3090": 23.6,
    "RTX 4090": 23.5,
}
#: Those whose times were measured; times of the others are scaled by teraflops.
MEASURED: Final = ("H100", "H200")
#: Seconds for one token through the linear layers of Mistral-7B, forward, on those (docs/performance.md).
_SECONDS: Final = 24e-6
_WEIGHTS: Final = 6.979e9


def known_gpu(name: str) -> str | None:
    """Return the key of TERAFLOPS for a GPU's name, such as NVIDIA-H100-80GB-HBM3; None if it is not known."""
    words = " ".join(re.split(r"[^A-Z0-9]+", name.upper()))
    found = [key for key in TERAFLOPS if re.search(rf"\b{key}\b", words)]
    if found == ["H100"] and "PCIE" in words:
        return "H100 PCIE"
    return max(found, key=len, default=None)


def step_seconds(plan: ExecutionPlan, shape: ModelShape, spec: FineTuneJobSpec, gpu: str) -> float:
    """Return the seconds of an optimizer step whose rows all have training.maxLength tokens.

    Args:
        plan: How the run is laid out.
        shape: The model's shape.
        spec: The job's spec.
        gpu: A key of TERAFLOPS.
    """
    layout = Layout(
        micro_batch=plan.micro_batch_size or 1,
        tokens=plan.tokens_per_pass or spec.training.max_length,
        checkpointed=plan.checkpointed_layers or 0,
        dequantized=plan.cached_layers or 0,
        compiled=bool(plan.compiled),
        selective=bool(plan.selective_checkpointing),
        processes=plan.world_size or 1,
        sharded=bool(plan.sharded),
        captured=bool(plan.captured),
    )
    rows = layout.micro_batch * (plan.gradient_accumulation_steps or 1)
    unit = _SECONDS * shape.active_weights / _WEIGHTS * TERAFLOPS[MEASURED[0]] / TERAFLOPS[gpu]
    return cost(rows, layout, shape, spec.quantization.bits, bool(plan.fp8)) * unit
