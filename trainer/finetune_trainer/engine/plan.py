"""Choose a run's execution plan, and put it into effect on the model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import structlog

from finetune_api.fields import quantity_bytes
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data import batching
from finetune_trainer.engine import capabilities, fp8, fp8_mlp, fsdp
from finetune_trainer.engine.dequantize import (
    dequantize_experts_in_one_pass,
    dequantize_in_one_pass,
    keep_dequantized,
)
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.engine.modules import decoder_layers
from finetune_trainer.engine.proof import Findings, prove
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.architecture import missing_kernels
from finetune_trainer.model.base import BaseModel
from finetune_trainer.model.experts import keep_dequantized as keep_experts_dequantized
from finetune_trainer.planning import planner
from finetune_trainer.planning.memory import GIB
from finetune_trainer.runtime.device import RuntimeDevice
from finetune_trainer.runtime.distributed import all_gather
from finetune_trainer.settings import Ranks

log = structlog.get_logger(__name__)


def plan_execution(
    spec: FineTuneJobSpec,
    base: BaseModel,
    device: RuntimeDevice,
    ranks: Ranks,
    train_lengths: Sequence[int],
    longest: int,
    findings: Findings | None = None,
    tried: bool = False,
    attention: str | None = None,
) -> ExecutionPlan:
    """Choose the fastest execution plan that fits the device, and log it.

    Args:
        spec: The job's spec.
        base: The base model.
        device: This process's device; its memory is the same on all ranks.
        ranks: This process among the job's.
        train_lengths: The length of each training row in tokens.
        longest: The longest row that is trained on or evaluated, in tokens.
        findings: What was proven of the loaded model; None before it is.
        tried: Whether it is but one of several plans that are compared: then it is not logged.
        attention: The attention implementation that an earlier plan of this run has found to work.

    Raises:
        ConfigInvalid: When the spec asks for what cannot run here.
        WontFit: When no plan fits; the message has the changes that would make it fit.
    """
    if findings:
        attention = findings.attention
    attention = attention or capabilities.choose_attention(spec, base, device)
    if spec.resources.gpu_memory and device.kind == "cuda":
        memory = quantity_bytes(spec.resources.gpu_memory)
        log.info(f"Planning with {memory / GIB:.1f} GiB of GPU memory (resources.gpuMemory)", has=device.memory_bytes)
        device = replace(device, memory_bytes=memory)
    if findings and findings.packing_problem:
        spec = spec.model_copy(update={"training": spec.training.model_copy(update={"packing": "disabled"})})
    packed = planner.uses_packing(spec, device, attention)
    plan = planner.make_plan(
        spec,
        device,
        ranks.size,
        attention,
        base.shape,
        longest=longest,
        tokens=batching.most_tokens(spec, train_lengths, ranks.size, packed),
        can_compile=capabilities.can_compile(spec),
        has_fp8=capabilities.has_fp8(spec, device),
        mean_row=sum(train_lengths) / len(train_lengths) if train_lengths else None,
    )
    if tried:
        return plan
    log.info(f"Execution plan: {_told(plan)}", **plan.manifest())
    if not plan.compiled and (reason := planner.compile_blocker(spec, device, bool(plan.packing), base.shape)):
        log.info(f"The decoder layers are not compiled: {reason}")
    if not plan.captured and spec.training.cuda_graphs == "enabled":
        reason = planner.capture_blocker(spec, device, bool(plan.packing), attention, ranks.size, base.shape)
        log.warning(f"CUDA graphs are not used: {reason or 'memory is short, or activations are recomputed'}")
    return plan


def _told(plan: ExecutionPlan) -> str:
    """Return the plan in a few words."""
    peak = plan.predicted_peak_memory_bytes
    told = {
        f"{plan.micro_batch_size} rows at once": True,
        f"{plan.gradient_accumulation_steps} passes a step": (plan.gradient_accumulation_steps or 1) > 1,
        "packed" if plan.packing else "padded": True,
        "compiled" if plan.compiled else "not compiled": True,
        "as CUDA graphs": plan.captured,
        f"{plan.checkpointed_layers} layers recomputed": plan.checkpointed_layers,
        "norms and dropout recomputed": plan.selective_checkpointing,
        f"{plan.cached_layers} layers kept dequantized": plan.cached_layers,
        "base weights sharded": plan.sharded,
        f"{(peak or 0) / GIB:.1f} GiB of GPU memory at most": peak,
    }
    return ", ".join(words for words, applies in told.items() if applies)


def prove_plan(
    model: Any,
    plan: ExecutionPlan,
    spec: FineTuneJobSpec,
    base: BaseModel,
    ranks: Ranks,
    rows: Sequence[list[int]],
    replan: Callable[[Findings], ExecutionPlan],
) -> ExecutionPlan:
    """Prove of the loaded model what `plan` relies on; return it, or the plan that holds instead.

    Args:
        model: The base model, or the PEFT model on it.
        plan: The plan so far.
        spec: The job's spec.
        base: The base model's tokenizer.
        ranks: This process among the job's; all of them take the same plan.
        rows: Token ids of the training rows.
        replan: Makes a plan for what was found.

    Raises:
        ConfigInvalid: When the model cannot be trained, or not in the way that the spec demands.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    missing = missing_kernels(core) if core.device.type == "cuda" else []
    if missing:
        log.warning(
            f"{' and '.join(missing)} not installed: torch computes the linear attention, convolutions or state spaces"
            " of this model, which is right and much slower, and rows are padded where only those kernels keep packed"
            " ones apart"
        )
    findings = Findings.agreed(all_gather(ranks, prove(core, spec, plan, rows, base.tokenizer.pad_token_id)))
    core.fused_loss.own = findings.own_loss
    if findings.packing_problem and spec.training.packing == "enabled":
        raise ConfigInvalid(f"spec.training.packing: enabled, but {findings.packing_problem}; take auto or disabled")
    if findings.packing_problem:
        log.warning(f"Rows are padded, not packed: {findings.packing_problem}")
    return replan(findings) if findings.packing_problem or findings.attention != plan.attention else plan


def prepare_base(model: Any, plan: ExecutionPlan, spec: FineTuneJobSpec) -> None:
    """Give the frozen weights of `model` the form that `plan` asks for.

    Before the adapter is attached: PEFT makes its layers to suit those that they are put on.
    """
    if plan.cached_layers:
        layers = decoder_layers(model)[: plan.cached_layers]
        keep_dequantized(layers)
        keep_experts_dequantized(layers)
    dequantize_experts_in_one_pass(model)
    if spec.quantization.bits == 4 and plan.compiled and not plan.sharded:
        dequantize_in_one_pass([model])


def apply_plan(model: Any, plan: ExecutionPlan, spec: FineTuneJobSpec, ranks: Ranks, device: RuntimeDevice) -> None:
    """Apply the rest of `plan` to the PEFT model: fused loss, FP8 products, FSDP sharding, shared LoRA inputs.

    Checkpointing and torch.compile depend on the batches and come later (compilation.compile_layers).

    Raises:
        ConfigInvalid: When a model that must be sharded or computed in FP8 does not name its layers.
    """
    core = model.get_base_model()
    patch_fused_loss(core)
    if plan.fp8:
        layers = decoder_layers(core)
        layers = layers[: plan.cached_layers] if spec.quantization.bits == 4 else layers
        fp8.convert(layers)
        fp8_mlp.fuse(layers)
    if plan.sharded:
        sharded = fsdp.shard(model, ranks, device.torch_name)
        if plan.compiled and spec.quantization.bits == 4:
            dequantize_in_one_pass(sharded)
    share_lora_inputs(model)
