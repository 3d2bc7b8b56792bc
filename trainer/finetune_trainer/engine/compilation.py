"""How the decoder layers run while they train: with torch.compile and activation checkpointing."""

import importlib
import inspect
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import structlog
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.attention import HOPPER
from finetune_trainer.engine.compiled_proof import Relevant, problem_of, recorded
from finetune_trainer.engine.fsdp import gather
from finetune_trainer.engine.lora import (
    clear_cache,
    seeded_dropout,
    shared_lora_inputs,
    while_training,
)
from finetune_trainer.engine.loss import compiled_problem
from finetune_trainer.engine.modules import decoder_layers
from finetune_trainer.errors import ConfigInvalid, type_and_reason
from finetune_trainer.model.architecture import missing_kernels
from finetune_trainer.runtime.distributed import all_gather
from finetune_trainer.runtime.patches import configure_compiler, restore_forward, swap_forward
from finetune_trainer.runtime.precision import mixed_precision
from finetune_trainer.runtime.rng import RngState
from finetune_trainer.runtime.transfer import on_device
from finetune_trainer.settings import Ranks

log = structlog.get_logger(__name__)
#: Arguments of a layer besides its input, and their dimensions that differ from one micro-batch to the next.
_DYNAMIC_DIMENSIONS: Final = {
    "position_ids": (1,),
    "attention_mask": (1, 2, 3),
    "cu_seq_lens_q": (0,),
    "cu_seq_lens_k": (0,),
}
#: A package of kernels for what is one call of torch as well.
_ONE_CALL: Final = "causal-conv1d"


def configure_layers(
    layers: Sequence[Any], *, checkpointed: int, compiled: bool, budget: float = 1.0, one_graph: bool = True
) -> None:
    """Checkpoint the activations of the first `checkpointed` layers, and compile all of them.

    Both hold while gradients are taken alone: evaluation and generation run the layers as they are. Calling it again
    replaces what an earlier call has set.

    Args:
        layers: The decoder layers.
        checkpointed: Layers that keep only their input for the backward pass, counted from the first.
        compiled: Whether layers are compiled.
        budget: The part of their activations that compiled layers keep; they recompute the cheapest of the rest.
        one_graph: Whether the first layer is compiled as the others are.
    """
    if compiled:
        configure_compiler(budget)
        _register_4bit_flops()
    checks = {shared.kernel_check for layer in layers for shared in shared_lora_inputs(layer)}
    device = next(layers[0].parameters()).device
    use_kernel = compiled and all(_lora_kernel_works(device, check) for check in checks)
    for index, layer in enumerate(layers):
        restore_forward(layer)
        plain = layer.forward
        for shared in shared_lora_inputs(layer):
            shared.added_by_kernel = use_kernel
        trains = bool(shared_lora_inputs(layer)) or any(each.requires_grad for each in layer.parameters())
        as_above = one_graph and trains
        trained = _compiled(plain, shared_lora_inputs(layer), as_above) if compiled else plain
        if index < checkpointed:
            trained = partial(checkpoint, trained, use_reentrant=False)
        if trained is not plain:
            swap_forward(layer, while_training(trained, plain))


def _lora_kernel_works(device: torch.device, check: str = "self_check") -> bool:
    """Return whether to use the Triton LoRA kernel: on Hopper, where it was measured to be faster, if it is right.

    `check` is the function of kernels.lora that tells.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return False
    try:
        problem = getattr(importlib.import_module("finetune_trainer.engine.kernels.lora"), check)(device)
    except Exception as error:
        problem = type_and_reason(error)
    if problem:
        log.warning(f"Triton LoRA kernel disabled, using PyTorch: {problem}")
    return not problem


def _register_4bit_flops() -> None:
    """Register FLOPs for gemm_4bit: the partitioner treats unknown ops as free."""
    try:
        product = torch.ops.bitsandbytes.gemm_4bit
    except AttributeError:  # bitsandbytes is not loaded, or an older one
        return
    if product not in flop_registry:
        register_flop_formula(product)(_flops_of_gemm_4bit)


def _flops_of_gemm_4bit(x: Any, weight: Any, shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return int(2 * math.prod(x) * shape[0])


def _compiled(plain: Callable[..., Any], inputs: list[Any], as_above: bool = False) -> Callable[..., Any]:
    """Compile once for all micro-batches: without the marks, torch would begin with a graph per number of tokens.

    With `as_above` the first layer that trains shares the graph of those above it. Nothing below it is trained, so that
    its input has no gradient, and torch would compile it anew. The gradient is computed, then, and dropped.
    """
    compiled = torch.compile(plain)
    names = list(inspect.signature(plain).parameters)[1:]

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(names, args, strict=False))  # some families pass them by place
        if as_above and not hidden.requires_grad:
            hidden = hidden.detach().requires_grad_()
        # Some families pass one tensor, or a dict of pairs by the kind of layer.
        for tensor in tree_leaves((hidden, kwargs.get("position_embeddings"))):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[1] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        for name, dimensions in _DYNAMIC_DIMENSIONS.items():
            tensor = kwargs.get(name)
            if isinstance(tensor, torch.Tensor):
                for dimension in dimensions:
                    if dimension < tensor.dim() and tensor.shape[dimension] > 1:
                        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        with seeded_dropout(inputs, hidden.device):
            return compiled(hidden, **kwargs)

    return forward


def compile_layers(
    model: Any,
    plan: ExecutionPlan,
    example: Mapping[str, Any],
    precision: str,
    budget: float = 1.0,
    one_graph: bool = True,
    relevant: Relevant = list,
    ranks: Ranks = Ranks(),  # noqa: B008 -- frozen
) -> ExecutionPlan:
    """Checkpoint activations and compile the decoder layers as `plan` says, and compare them with plain ones.

    Args:
        model: The PEFT model, with its fused loss.
        plan: The execution plan.
        example: A micro-batch for the warm-up, about as large as others.
        precision: training.precision.
        budget: What selective checkpointing keeps (see `configure_layers`).
        one_graph: Whether the first layer is compiled as the others are: half the time of the compiler, for some 0.2 %
            of a step.
        relevant: Returns what means something of the adapters' gradients (see compiled_proof).
        ranks: This process among the job's: all compile, or none.

    Returns:
        The plan in effect: where the warm-up shows that compiling fails, or makes something else of the layers, they
        run eager, and the log says why.
    """
    core = model.get_base_model()
    core.fused_loss.compiled = bool(plan.compiled)
    if not plan.compiled and not plan.gradient_checkpointing:
        return plan
    problem = _compile_problem(core) if plan.compiled else None
    if problem and not plan.gradient_checkpointing:
        log.warning(f"torch.compile is not used, running eager (slower): {problem}")
        core.fused_loss.compiled = False
        return plan.model_copy(update={"compiled": False})
    layers = decoder_layers(core)
    checkpointed = len(layers) if plan.checkpointed_layers is None else plan.checkpointed_layers
    checkpointed = checkpointed if plan.gradient_checkpointing else 0
    budget = budget if plan.selective_checkpointing else 1.0
    compiled = bool(plan.compiled) and problem is None
    configure_layers(layers, checkpointed=checkpointed, compiled=compiled, budget=budget, one_graph=one_graph)
    if not plan.compiled:
        return plan
    if compiled:
        log.info("Compiling the decoder layers")
        began = time.monotonic()
        try_out = _compare_gathered if plan.sharded else _warm_up
        with _left_alone(model):
            found = all_gather(ranks, try_out(model, layers, example, precision, relevant))
        problem = next(filter(None, found), None)
        if problem is None:
            log.info(f"The decoder layers are compiled, after {time.monotonic() - began:.0f} s")
            return plan
    how = "failed" if compiled else "is not used"
    log.warning(f"torch.compile {how}, running eager (slower): {problem}")
    if plan.selective_checkpointing:  # memory was to be saved: then by whole layers
        checkpointed = len(layers)
        whole = {"gradient_checkpointing": True, "checkpointed_layers": checkpointed, "selective_checkpointing": False}
        plan = plan.model_copy(update=whole)
    configure_layers(layers, checkpointed=checkpointed, compiled=False)
    core.fused_loss.compiled = False
    return plan.model_copy(update={"compiled": False})


def kernels_to_compile(core: Any) -> list[str]:
    """Return packages that are not installed, without whose kernels compiling `core` would take its time."""
    return [name for name in missing_kernels(core) if name != _ONE_CALL]


def _compile_problem(core: Any) -> str | None:
    """Return why the layers of `core` are not worth a try, None if they are."""
    if missing := kernels_to_compile(core):
        return f"{' and '.join(missing)} not installed, and torch's loops over tokens would be compiled token by token"
    try:
        decoder_layers(core)
    except ConfigInvalid as error:
        return str(error)
    return None


@contextmanager
def _left_alone(model: Any) -> Iterator[None]:
    """Let `model` train in this block, and leave no trace of it: neither gradients nor draws of generators."""
    before, was_training = RngState.now(), model.training
    model.train()
    try:
        yield
    finally:
        clear_cache(shared_lora_inputs(model))
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        before.restore()


def _warm_up(
    model: Any, layers: Sequence[Any], example: Mapping[str, Any], precision: str, relevant: Relevant
) -> str | None:
    """Run a forward and a backward pass, drop the results, and compare its layers with plain ones.

    What cannot be compiled, or is compiled to something else, shows here, before anything depends on it. Returns the
    problem, None when all went well.
    """

    def compare() -> str | None:
        with recorded(layers) as calls, mixed_precision(model.device, precision):
            loss = model(**on_device(example, model.device))
        loss.backward()
        del loss
        model.zero_grad(set_to_none=True)
        return _tiles_problem(model) or problem_of(calls, precision, relevant)

    return _reason(compare)


def _compare_gathered(
    model: Any, layers: Sequence[Any], example: Mapping[str, Any], precision: str, relevant: Relevant
) -> str | None:
    """Compare compiled layers with plain ones where weights are sharded.

    All ranks gather the same weights, for a plain pass and then for each layer that is compared, whatever becomes of
    compiling on one of them: it would wait for, or take, what another gathers for something else.
    """
    with torch.no_grad(), recorded(layers) as calls, mixed_precision(model.device, precision):
        model(**on_device(example, model.device))
    found = [_reason(partial(_tiles_problem, model))]
    for call in calls:
        gather(call.layer)
        found.append(_reason(partial(problem_of, [call], precision, relevant)))
    return next(filter(None, found), None)


def _reason(compare: Callable[[], str | None]) -> str | None:
    """Return what `compare` returns, or why it fails."""
    try:
        return compare()
    except torch.OutOfMemoryError:  # no matter of compiling: training itself knows what to do
        log.warning("Compiled layers were not compared with plain ones: the GPU's memory is full")
        return None
    except Exception as error:
        return type_and_reason(error)


def _tiles_problem(model: Any) -> str | None:
    core = model.get_base_model()
    settings = core.fused_loss
    return None if settings.own else compiled_problem(core.get_output_embeddings(), settings.logits)
