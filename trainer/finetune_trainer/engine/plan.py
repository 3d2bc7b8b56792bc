"""Choose a run's execution plan, and put it into effect on the model."""

from collections.abc import Sequence
from typing import Any

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data import batching
from finetune_trainer.engine import capabilities, fp8, fsdp
from finetune_trainer.engine.dequantize import dequantize_in_one_pass, keep_dequantized
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.loss import patch_fused_loss
from finetune_trainer.engine.modules import decoder_layers
from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning import planner
from finetune_trainer.runtime.device import RuntimeDevice
from finetune_trainer.settings import Ranks

log = structlog.get_logger(__name__)


def plan_execution(
    spec: FineTuneJobSpec,
    base: BaseModel,
    device: RuntimeDevice,
    ranks: Ranks,
    train_lengths: Sequence[int],
    longest: int,
) -> ExecutionPlan:
    """Choose the fastest execution plan that fits the device, and log it.

    Args:
        spec: The job's spec.
        base: The base model.
        device: This process's device; its memory is the same on all ranks.
        ranks: This process among the job's.
        train_lengths: The length of each training row in tokens.
        longest: The longest row that is trained on or evaluated, in tokens.

    Raises:
        ConfigInvalid: When the spec asks for what cannot run here.
        WontFit: When no plan fits; the message has the changes that would make it fit.
    """
    attention = capabilities.choose_attention(spec, base, device)
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
    )
    log.info("Execution plan", **plan.manifest())
    if not plan.compiled and (reason := planner.compile_blocker(spec, device, bool(plan.packing))):
        log.info(f"The decoder layers are not compiled: {reason}")
    return plan


def prepare_base(model: Any, plan: ExecutionPlan, spec: FineTuneJobSpec) -> None:
    """Give the frozen weights of `model` the form that `plan` asks for.

    Before the adapter is attached: PEFT makes its layers to suit those that they are put on.
    """
    if plan.cached_layers:
        keep_dequantized(decoder_layers(model)[: plan.cached_layers])
    if spec.quantization.bits == 4 and plan.compiled:
        dequantize_in_one_pass(model)


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
        fp8.convert(layers[: plan.cached_layers] if spec.quantization.bits == 4 else layers)
    if plan.sharded:
        fsdp.shard(model, ranks, device.torch_name)
    share_lora_inputs(model)
