"""How the decoder layers run while they train: compiled, and some of them computed again in the backward pass."""

import functools
import hashlib
import importlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, register_flop_formula

from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.attention import HOPPER
from finetune_trainer.engine.lora import (
    clear_cache,
    inputs_of,
    seeded_dropout,
    while_training,
)
from finetune_trainer.engine.modules import decoder_layers
from finetune_trainer.errors import type_and_reason
from finetune_trainer.runtime.precision import mixed_precision
from finetune_trainer.runtime.rng import RngState
from finetune_trainer.runtime.transfer import on_device

log = structlog.get_logger(__name__)
#: Arguments of a layer beside its input, and which of their dimensions differ from one micro-batch to the next.
_CHANGING: Final = {"position_ids": (1,), "attention_mask": (1, 2, 3), "cu_seq_lens_q": (0,), "cu_seq_lens_k": (0,)}
#: Graphs torch may make of the layers, which are one function to it. Beyond its own limit of 8 it gives up in silence.
_MOST_GRAPHS: Final = 64


def configure_layers(layers: Sequence[Any], *, checkpointed: int, compiled: bool, budget: float = 1.0) -> None:
    """Checkpoint the activations of the first `checkpointed` layers, and compile all of them.

    Both hold while gradients are taken alone: evaluation and generation run the layers as they are. Calling it again
    replaces what an earlier call has set.

    Args:
        layers: The decoder layers.
        checkpointed: Layers that keep only their input for the backward pass, counted from the first.
        compiled: Whether layers are compiled.
        budget: The part of their activations that compiled layers keep; they recompute the cheapest of the rest.
    """
    if compiled:
        torch._dynamo.config.recompile_limit = _MOST_GRAPHS
        torch._dynamo.config.optimize_ddp = False  # it would divide graphs that are a layer each already
        torch._functorch.config.activation_memory_budget = budget
        torch._functorch.config.is_non_builtin_to_include = True  # bitsandbytes' products cost something too
        torch._inductor.config.deterministic = True  # a resumed run compiles the same sums, whatever it measures
        torch._inductor.config.combo_kernels = True  # small kernels that do not depend on each other are one
        torch._inductor.config.coordinate_descent_tuning = True  # tiles that change no number are tried out
        torch._inductor.config.triton.multi_kernel = 2  # a norm reads its row once
        _tell_cost_of_4_bit_products()
    has_kernels = compiled and _has_kernels(next(layers[0].parameters()).device)
    for index, layer in enumerate(layers):
        layer.__dict__.pop("forward", None)
        plain = layer.forward
        for inputs in inputs_of(layer):
            inputs.added_by_kernel = has_kernels
        trained = _compiled(plain, inputs_of(layer)) if compiled else plain
        if index < checkpointed:
            trained = functools.partial(checkpoint, trained, use_reentrant=False)
        if trained is not plain:
            layer.forward = while_training(trained, plain)


def _has_kernels(device: torch.device) -> bool:
    """Whether what adapters add is added by our own kernel: on Hopper, where that was measured to be faster."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return False
    try:
        problem = importlib.import_module("finetune_trainer.engine.kernels.lora").self_check(device)
    except Exception as error:
        problem = f"fail here: {type_and_reason(error)}"
    if problem:
        log.warning(f"The kernels that add what adapters find cannot be used, torch's are: they {problem}")
    return not problem


def _tell_cost_of_4_bit_products() -> None:
    """Of an operation whose cost torch does not know it thinks that computing it again is free."""
    try:
        product = torch.ops.bitsandbytes.gemm_4bit
    except AttributeError:  # bitsandbytes is not loaded, or an older one
        return
    if product not in flop_registry:
        register_flop_formula(product)(_flops_of_4_bit_product)


def _flops_of_4_bit_product(x: Any, weight: Any, shape: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(x) * shape[0]


def _compiled(plain: Callable[..., Any], inputs: list[Any]) -> Callable[..., Any]:
    """One compilation for all micro-batches: without being told, it would begin with one for each number of tokens."""
    compiled = torch.compile(plain)

    def forward(hidden: torch.Tensor, **kwargs: Any) -> Any:
        for tensor in (hidden, *(kwargs.get("position_embeddings") or ())):
            torch._dynamo.maybe_mark_dynamic(tensor, 1)
        for name, dimensions in _CHANGING.items():
            tensor = kwargs.get(name)
            if isinstance(tensor, torch.Tensor):
                for dimension in dimensions:
                    if dimension < tensor.dim() and tensor.shape[dimension] > 1:
                        torch._dynamo.maybe_mark_dynamic(tensor, dimension)
        with seeded_dropout(inputs, hidden.device):
            return compiled(hidden, **kwargs)

    return forward


def set_compile_cache(folder: Path) -> None:
    """Let what is compiled be found again by the next run that has the same `folder`: torch's and triton's caches.

    By the same version of the engine: torch keeps how gradients of our own operations are computed, and does not see
    when that changes.
    """
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.rglob("*.py")))
    folder = folder / hashlib.sha256(sources).hexdigest()[:12]
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def compile_layers(
    model: Any, plan: ExecutionPlan, example: Mapping[str, Any], precision: str, budget: float = 1.0
) -> ExecutionPlan:
    """Checkpoint activations and compile the decoder layers as `plan` says, and warm them up.

    Args:
        model: The PEFT model, with its fused loss.
        plan: The execution plan.
        example: A micro-batch for the warm-up, about as large as others.
        precision: training.precision.
        budget: What selective checkpointing keeps (see `configure_layers`).

    Returns:
        The plan in effect: where the warm-up shows that compiling fails, layers run eager, and the log says why.
    """
    core = model.get_base_model()
    core.fused_loss.compiled = bool(plan.compiled)
    if not plan.compiled and not plan.gradient_checkpointing:
        return plan
    layers = decoder_layers(core)
    checkpointed = len(layers) if plan.checkpointed_layers is None else plan.checkpointed_layers
    checkpointed = checkpointed if plan.gradient_checkpointing else 0
    budget = budget if plan.selective_checkpointing else 1.0
    configure_layers(layers, checkpointed=checkpointed, compiled=bool(plan.compiled), budget=budget)
    if not plan.compiled:
        return plan
    log.info("Compiling the decoder layers")
    began = time.monotonic()
    error = _warm_up(model, example, precision)
    if error is None:
        log.info(f"The decoder layers are compiled, after {time.monotonic() - began:.0f} s")
        return plan
    log.warning(f"torch.compile failed, running eager (slower): {error}")
    if plan.selective_checkpointing:  # memory was to be saved: then by whole layers
        checkpointed = len(layers)
        whole = {"gradient_checkpointing": True, "checkpointed_layers": checkpointed, "selective_checkpointing": False}
        plan = plan.model_copy(update=whole)
    configure_layers(layers, checkpointed=checkpointed, compiled=False)
    core.fused_loss.compiled = False
    return plan.model_copy(update={"compiled": False})


def _warm_up(model: Any, example: Mapping[str, Any], precision: str) -> str | None:
    """Run a forward and a backward pass and drop the results; generators stay as they are.

    What cannot be compiled shows here, before anything depends on it. Returns the error, None when all went well.
    """
    before, was_training = RngState.now(), model.training
    model.train()
    try:
        with mixed_precision(model.device, precision):
            loss = model(**on_device(example, model.device))
        loss.backward()
    except torch.OutOfMemoryError:
        return None  # no matter of compiling: training itself knows what to do
    except Exception as error:
        return type_and_reason(error)
    finally:
        clear_cache(inputs_of(model))
        model.zero_grad(set_to_none=True)
        model.train(was_training)
        before.put_back()
    return None
