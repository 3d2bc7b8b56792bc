"""Will a run fit the GPU? Asks the trainer's own sizing, which needs neither a GPU nor torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.fields import quantity_bytes
from finetune_cli import model_config
from finetune_cli.errors import CliError
from finetune_cli.output import formatting
from finetune_trainer.errors import TrainerError
from finetune_trainer.planning import planner
from finetune_trainer.planning.device import Device
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.parameters import with_new_tokens
from finetune_trainer.planning.refusals import check_config

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob, FineTuneJobSpec
    from finetune_api.status import ExecutionPlan

#: Memory that every GPU has; a number below it lacks its unit.
_LEAST_BYTES = 1 << 20
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
    size = int(float(match[1]) * _UNITS[match[2]])
    if size < _LEAST_BYTES:
        raise CliError(
            f"--gpu-memory: {value!r} is {size:,} bytes, less than any GPU has",
            hint=f"with a unit: --gpu-memory {match[1]}Gi",
        )
    return size


@dataclass(frozen=True)
class Forecast:
    """What is known of GPU memory ahead of a run.

    `plan` is the trainer's own, None where it makes none. `fits` is None where it cannot be told, or was not asked.
    `shape` is the model's, None where it is not known.
    """

    plan: ExecutionPlan | None
    gpu_memory_bytes: int | None
    fits: bool | None
    lines: tuple[str, ...]
    shape: ModelShape | None = None

    @property
    def data(self) -> dict[str, Any]:
        """For programs."""
        plan = self.plan
        return {
            "predictedPeakBytes": plan and plan.predicted_peak_memory_bytes,
            "gpuMemoryBytes": self.gpu_memory_bytes,
            "fits": self.fits,
            "microBatchSize": plan and plan.micro_batch_size,
            "gradientAccumulationSteps": plan and plan.gradient_accumulation_steps,
            "gradientCheckpointing": plan and plan.gradient_checkpointing,
            "checkpointedLayers": plan and plan.checkpointed_layers,
            "selectiveCheckpointing": plan and plan.selective_checkpointing,
            "cachedLayers": plan and plan.cached_layers,
            "packing": plan and plan.packing,
            "compiled": plan and plan.compiled,
            "captured": plan and plan.captured,
            "message": " ".join(self.lines),
        }


def forecast(job: FineTuneJob, gpu_memory: int | None, config_file: Path | None = None) -> Forecast:
    """Predict the peak GPU memory of `job`, and whether it fits `gpu_memory` bytes.

    The model's shape comes from `config_file`, else from config.json where the model lies. Raises CliError for a
    config_file that cannot be used.
    """
    config = model_config.read(config_file) if config_file else None
    if not job.spec.resources.gpus_per_node:
        fits = None if gpu_memory is None else True
        return Forecast(
            None, gpu_memory, fits, ("resources.gpusPerNode is 0: the run uses the CPU and no GPU memory.",)
        )
    try:
        config = config or model_config.fetch(job.spec.model)
    except CliError as error:
        why = f"Not predicted: {error.message}" + (f" ({error.hint})" if error.hint else "")
        return Forecast(None, gpu_memory, None, (f"{why}.", "Give the model's config.json with --model-config FILE."))
    try:
        check_config(config, job.spec)
        shape = shape_of(with_new_tokens(config, len(job.spec.dataset.add_tokens or ())), job.spec)
    except TrainerError as error:
        return Forecast(None, gpu_memory, False, (f"The trainer refuses it: {error}.",))
    if gpu_memory is None and job.spec.resources.gpu_memory:
        gpu_memory = quantity_bytes(job.spec.resources.gpu_memory)
    if shape is None:
        kind = config.get("model_type") or "this kind"
        return Forecast(None, gpu_memory, None, (f"Not predicted: models of type {kind} are not counted yet.",))
    found = _with_memory(job.spec, shape, gpu_memory) if gpu_memory else _without_memory(job.spec, shape)
    found = replace(found, shape=shape)
    if shape.counts is None:
        kind = config.get("model_type") or "this type"
        return replace(found, lines=(*found.lines, f"An estimate: weights of {kind} models are counted as Llama's."))
    return found


def shape_of(config: Mapping[str, Any], spec: FineTuneJobSpec) -> ModelShape | None:
    """Return the model's shape: by a table where that holds the type and the layers, at once.

    Else the trainer's own code builds the model without memory, which takes torch and some seconds; without torch the
    weights of a type that the table does not hold are estimated. Raises TrainerError for what a trainer refuses.
    """
    shape = ModelShape.from_config(config)
    if (shape and shape.counts and _names_known(shape, spec)) or spec.model.trust_remote_code:
        return shape
    if not can_build():
        return shape
    from finetune_trainer.model.measure import measure

    return measure(config, spec) or shape


def can_build() -> bool:
    """Return whether models can be built here, without their weights."""
    try:
        return all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft"))
    except ImportError:
        return False


def _names_known(shape: ModelShape, spec: FineTuneJobSpec) -> bool:
    """Return whether a shape tells how many weights the adapter has."""
    lora = spec.lora
    plain = not (lora.target_pattern or lora.layers_to_transform or lora.modules_to_save)
    names = {name.rpartition(".")[2] for name in lora.target_modules}
    return plain and names <= set(shape.linear_shapes) and not (shape.counts and shape.counts.experts)


def _with_memory(spec: FineTuneJobSpec, shape: ModelShape, gpu_memory: int) -> Forecast:
    """Return what the trainer would do on a GPU of `gpu_memory` bytes."""
    try:
        plan = _plan(spec, shape, gpu_memory)
    except TrainerError as error:
        return Forecast(None, gpu_memory, False, (f"Does not fit: {error}",))
    return Forecast(
        plan, gpu_memory, True, (f"It fits a GPU with {formatting.size(gpu_memory)}.", f"{_sentence(plan)}.")
    )


def _without_memory(spec: FineTuneJobSpec, shape: ModelShape) -> Forecast:
    """Return what the trainer would do with all the memory it could want, and with as little as it gets by with."""
    plan, least = _plan(spec, shape, 0), _plan(_frugal(spec), shape, 0)
    lines = [f"{_sentence(plan)}."]
    if least != plan:
        lines.append(f"Where that is too much, it takes less, down to {_sentence(least)}.")
    return Forecast(plan, None, None, (*lines, "Add --gpu-memory 24Gi to see whether it fits."))


def _plan(spec: FineTuneJobSpec, shape: ModelShape, gpu_memory: int) -> ExecutionPlan:
    device = Device("cuda", memory_bytes=gpu_memory)
    world = spec.resources.nodes * spec.resources.gpus_per_node
    plan: ExecutionPlan = planner.make_plan(spec, device, world, spec.model.attention, shape)
    return plan


def _frugal(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """`spec` with the choices that take the least memory wherever the trainer is free to choose."""
    training = spec.training
    less = {
        "micro_batch_size": 1 if training.micro_batch_size == "auto" else training.micro_batch_size,
        "gradient_checkpointing": (
            "enabled" if training.gradient_checkpointing == "auto" else training.gradient_checkpointing
        ),
    }
    cached = 0 if spec.quantization.cached_layers == "auto" else spec.quantization.cached_layers
    return spec.model_copy(
        update={
            "training": training.model_copy(update=less),
            "quantization": spec.quantization.model_copy(update={"cached_layers": cached}),
        }
    )


def _sentence(plan: ExecutionPlan) -> str:
    count = plan.checkpointed_layers
    checkpointing = f"gradient checkpointing in {_layers(count)}" if count else "no gradient checkpointing"
    if plan.selective_checkpointing:
        checkpointing = f"{checkpointing}, selective in the rest" if count else "selective gradient checkpointing"
    cached = f", weights kept dequantized in {_layers(plan.cached_layers)}" if plan.cached_layers else ""
    return (
        f"{formatting.size(plan.predicted_peak_memory_bytes or 0)} at the peak, per GPU, with micro-batch"
        f" {plan.micro_batch_size} × {plan.gradient_accumulation_steps} accumulated, {checkpointing}{cached}"
    )


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"
