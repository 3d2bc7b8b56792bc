"""Plan how a run is laid out on its devices. Pure arithmetic, importable without torch."""

from collections.abc import Callable
from typing import Final

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import ConfigInvalid, WontFit
from finetune_trainer.planning.device import Device
from finetune_trainer.planning.layout_search import LayoutSearch
from finetune_trainer.planning.memory import Layout
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.suggestions import explain_wont_fit

#: Attention implementations that take packed rows. auto becomes one of them on GPUs that have one.
_WITHOUT_PADDING: Final = ("auto", "varlen", "flash_attention_2")


def uses_packing(spec: FineTuneJobSpec, device: Device, attention: str) -> bool:
    """Return whether rows are packed, that is laid end to end without padding."""
    if spec.training.packing == "auto":
        return device.kind == "cuda" and attention in _WITHOUT_PADDING
    return spec.training.packing == "enabled"


def compile_blocker(spec: FineTuneJobSpec, device: Device, packed: bool, shape: ModelShape | None) -> str | None:
    """Return why the decoder layers are not compiled, or None if they are."""
    if spec.training.compile == "disabled":
        return "training.compile is disabled"
    if spec.quantization.bits == 8:
        return "LLM.int8 weights cannot be compiled"
    if spec.lora.dora:
        return "DoRA is not compiled"
    if spec.training.compile == "enabled":
        return None
    if device.kind == "cpu":
        return "it does not pay on a CPU"
    if shape and shape.routing:
        return "layers with experts take minutes to compile (training.compile: enabled does so)"
    return None if packed else "rows are padded, each micro-batch to another width"


def capture_blocker(
    spec: FineTuneJobSpec, device: Device, packed: bool, attention: str, world_size: int, shape: ModelShape | None
) -> str | None:
    """Return why passes are not replayed as CUDA graphs, or None if they may be."""
    if spec.training.cuda_graphs == "disabled":
        return "training.cudaGraphs is disabled"
    if device.kind == "cpu":
        return "there is no GPU"
    if not packed:
        return "rows are padded, each micro-batch to another width"
    if attention not in _WITHOUT_PADDING:
        return f"attention {attention} looks for the beginnings of rows in each pass"
    if spec.quantization.bits == 8:
        return "LLM.int8 products wait for the GPU"
    if spec.training.precision == "fp16":
        return "the loss scale of fp16 changes from step to step"
    if shape and shape.routing:
        return "tokens are dealt out to experts on the host"
    return "several GPUs add up gradients while the backward pass runs" if world_size > 1 else None


def local_batch(spec: FineTuneJobSpec, world_size: int) -> int:
    """Return the sequences of each process and step; raises ConfigInvalid if batchSize cannot be split evenly."""
    if spec.training.batch_size % world_size:
        raise ConfigInvalid(
            f"spec.training.batchSize: {spec.training.batch_size} must be a multiple of the {world_size} processes"
        )
    return spec.training.batch_size // world_size


def make_plan(
    spec: FineTuneJobSpec,
    device: Device,
    world_size: int,
    attention: str,
    shape: ModelShape | None = None,
    longest: int | None = None,
    tokens: Callable[[int], int] | None = None,
    can_compile: bool = True,
    has_fp8: bool = True,
    mean_row: float | None = None,
) -> ExecutionPlan:
    """Choose the fastest layout that fits; the effective batch is always batchSize.

    Args:
        spec: The job's spec.
        device: What each process trains on.
        world_size: Number of processes.
        attention: The attention implementation.
        shape: The model's shape; without it no memory is predicted.
        longest: Tokens of the longest row; default: training.maxLength.
        tokens: Returns the most tokens of any micro-batch of so many rows; default: every row is the longest.
        can_compile: Whether torch.compile works here.
        has_fp8: Whether the GPU computes in fp8.
        mean_row: Tokens of a row on average; default: all are the longest.

    Raises:
        ConfigInvalid: Batch sizes do not divide evenly.
        WontFit: No layout fits; the text says which changes would make it fit.
    """
    share = local_batch(spec, world_size)
    length = min(longest or spec.training.max_length, spec.training.max_length)
    packed = uses_packing(spec, device, attention)
    compiled = can_compile and compile_blocker(spec, device, packed, shape) is None
    capturable = capture_blocker(spec, device, packed, attention, world_size, shape) is None
    fp8 = spec.training.precision == "fp8" and has_fp8
    mean_row = mean_row if packed else None
    search = LayoutSearch(
        spec, device, shape, attention, length, share, world_size, compiled, tokens, capturable, mean_row, fp8
    )
    layout: Layout = search.default()
    peak: int | None = None
    if shape and device.kind == "cuda":
        found = search.fastest(shape)
        if found is None:
            raise WontFit(explain_wont_fit(search, shape))
        layout, peak = found
    return ExecutionPlan(
        micro_batch_size=layout.micro_batch,
        gradient_accumulation_steps=share // layout.micro_batch,
        world_size=world_size,
        sharded=layout.sharded if world_size > 1 else None,
        gradient_checkpointing=layout.checkpointed > 0,
        checkpointed_layers=layout.checkpointed if shape else None,
        selective_checkpointing=layout.selective,
        cached_layers=layout.dequantized if spec.quantization.bits == 4 else None,
        packing=packed,
        tokens_per_pass=layout.tokens,
        compiled=layout.compiled,
        captured=layout.captured,
        fp8=fp8 and _has_weights_to_round(spec, layout),
        attention=attention,
        predicted_peak_memory_bytes=peak,
    )


def _has_weights_to_round(spec: FineTuneJobSpec, layout: Layout) -> bool:
    plain = layout.dequantized > 0 if spec.quantization.bits == 4 else spec.quantization.bits == 16
    return plain and not layout.sharded
