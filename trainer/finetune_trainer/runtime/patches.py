"""All that we change in other libraries, in one table, and the functions that do it.

Each entry of PATCHES names the library's source that the patch was written against, by its SHA-256. A test compares:
when the source changes, somebody must look at the patch before it goes on.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Patch:
    """A change to a library.

    Attributes:
        name: What is changed.
        why: What would happen without it.
        check: What to look at when the source has changed.
        sources: For each function or setting of the library ("module:qualified.name") the SHA-256 of its sources that
            are known to be right. Where versions that we support differ, there are several.
    """

    name: str
    why: str
    check: str
    sources: Mapping[str, tuple[str, ...]]


PATCHES: Final = (
    Patch(
        name="bitsandbytes: optim.optimizer.sync_gpu",
        why="Optimizer8bit.step waits for the GPU after each matrix, which only paged state may need.",
        check="without_gpu_sync: does unpaged state still need no wait?",
        sources={
            "bitsandbytes.optim.optimizer:sync_gpu": (
                "34adee14609a57b1a9866d6ed1f78ab428868865d75081383c31aac4b1408e65",
            ),
        },
    ),
    Patch(
        name="bitsandbytes: the class of an Optimizer8bit",
        why="It launches a kernel for each of hundreds of small matrices.",
        check="engine.optimizer: does _FusedStep.step still do what Optimizer8bit.step does, but for many at once?",
        sources={
            "bitsandbytes.optim.optimizer:Optimizer8bit.step": (
                "1ff73e3157161684810fec691a98645779b4889662929beaa824d02c45901c30",
            ),
        },
    ),
    Patch(
        name="transformers: masking_utils.find_packed_sequence_indices",
        why="It waits for the GPU in each forward pass, for a mask that is not made.",
        check="packed_sequences_known: is None still the answer that makes no mask?",
        sources={
            "transformers.masking_utils:find_packed_sequence_indices": (
                "ebd2ac7ca795dbb0c3c18226b9e06c6470d5f6033c6f532182876da00346412f",
            ),
        },
    ),
    Patch(
        name="transformers: forward of a causal language model",
        why="Logits of all tokens at one time take more memory than anything else.",
        check="engine.model_loss: is the loss still the base model, the head, then cross-entropy of the next token?",
        sources={
            "transformers.models.mistral.modeling_mistral:MistralForCausalLM.forward": (
                "3f2da57b7c1e8d82c633fd7277a1b6ea599fd535b319875db6ec46d4a1331804",  # 5.23
                "dfb6ce530331c666a0b5a9b89107e561b04dd6260ad4bd0dec166d332c34181b",  # 5.17
            )
        },
    ),
    Patch(
        name="transformers: forward of a decoder layer",
        why="Layers are compiled and checkpointed one by one, in training only.",
        check="engine.compilation: are layers still called with hidden states first and everything else by name?",
        sources={
            "transformers.modeling_layers:GradientCheckpointingLayer.__call__": (
                "b11681464e3ee0eba9b806c3b503dfaba804fc28ade233e74998fc3104dcac91",  # 5.23
                "bca7a63550b2e0a7cbb5bb0fa89f9f2b30cc66043b63e6f2efaf0b3f7e50ab2b",  # 5.17
            )
        },
    ),
    Patch(
        name="peft: forward of a LoRA layer",
        why="Adapters that read the same input each draw a dropout mask and multiply on their own.",
        check="engine.lora: is a LoRA layer still base(x) + B A dropout(x) * scaling, and types converted alike?",
        sources={
            "peft.tuners.lora.layer:Linear.forward": (
                "ec0a80f5c5ce05f5dd90027952bb5d29aaf910e9d2ab40486a90e8a03c7e1cd9",
            ),
            "peft.tuners.lora.bnb:Linear4bit.forward": (
                "ba53967c7f8574384a160a6a897e8ec6205718e9bfef9d6998cb40cb8bcf6eb8",
            ),
            "peft.tuners.lora.bnb:Linear8bitLt.forward": (
                "0b619a1801a7bd5794a956d0d7825fb526dd6592c8bf8c7afe765c91138a2a2d",
            ),
        },
    ),
    Patch(
        name="peft: forward of the adapter of experts",
        why="It adds the adapter's product to the weights of all experts, in a copy of them.",
        check="model.experts and model.grouped_experts: is it still W + B A * scaling of each expert, stored alike?",
        sources={
            "peft.tuners.lora.layer:ParamWrapper.forward": (
                "704fb56e52604110a6d4c497d21b3c76f7195a572570e8ce20a016ae587a7069",
            ),
            "peft.tuners.lora.layer:ParamWrapper.get_delta_weight": (
                "ef052a65fb6c1ad126c59e14285cf86a17ed1dde1c54489bb4cb54d9fedfbcee",
            ),
        },
    ),
    Patch(
        name="transformers: forward of experts",
        why="It keeps dequantized weights for the backward pass. Ours is registered as an implementation of experts.",
        check="model.grouped_experts.forward: does it still compute the same, and take the same arguments?",
        sources={
            "transformers.integrations.moe:grouped_mm_experts_forward": (
                "54beecae8764c6e99e73d0a6c85f9120c9535d713647d099dd91da6c74e1f15e",
            ),
        },
    ),
    Patch(
        name="transformers: rotary embeddings and gated products",
        why="They are a dozen small kernels a layer. Only evaluations, which wait for each of them, have ours.",
        check="evaluation.fused_modules: it compares at run time, but is its name still what models call?",
        sources={
            "transformers.models.mistral.modeling_mistral:apply_rotary_pos_emb": (
                "ea234325c15de475147027ac7da4307167d082b13f4c62a7f2921fef4f9e5e87",
            ),
            "transformers.models.mistral.modeling_mistral:MistralMLP.forward": (
                "03df2d7685cf8446594448cbd33ef676a2b088779d99d9803abe3bed2ec7ad9b",
            ),
        },
    ),
    Patch(
        name="bitsandbytes: forward of Linear4bit",
        why="Compiled layers dequantize by our own kernel: bitsandbytes' takes the host longer to start.",
        check="engine.dequantize: does it still multiply with the dequantized weights in compute_dtype?",
        sources={
            "bitsandbytes.nn:Linear4bit.forward": ("d52cf63457717cc718ca0a449dad0967171e679be90d5d2adcafe2e8a141093d",)
        },
    ),
    Patch(
        name="torch: settings of torch.compile",
        why="One compilation for all micro-batches, whose sums a resumed run computes alike, within a memory budget.",
        check="configure_compiler: do these settings still exist, and mean the same?",
        sources={
            "torch._dynamo.config:recompile_limit": (
                "d19376c156e77957aa3bc1aa7215860be1ab3330126f3a2a4cea38914474a27c",
            ),
            "torch._dynamo.config:optimize_ddp": (
                "389c63612adf82ab60dd36f5b28a00b1a6494f67fa4311a3aa2c79ec7757cb00",  # 2.13
                "ce8cfa1ef7256a4a9707a04944f00c2433690fb46d77288366e6c22e0e72bdbf",  # 2.11
            ),
            "torch._functorch.config:autograd_cache_allow_custom_autograd_functions": (
                "4ec6479637145cc14c444f3ca41b19f91bc956143ced8df018a7c41fd235f46a",
            ),
            "torch._functorch.config:activation_memory_budget": (
                "1b8396bd1fc1ce3e6020c3d78151af7c29363fd67840f8de82ee0a9f155b3637",
            ),
            "torch._functorch.config:is_non_builtin_to_include": (
                "1c04c5a749c36a24e055cc53769ebc789f1a31d92630f1217001dfb54b7e1e85",
            ),
            "torch._inductor.config:deterministic": (
                "ebbeec6c5391ef39a81e5b6c41d3c0d8e300d645e12297b20690afda5d0f5a5b",
            ),
            "torch._inductor.config:combo_kernels": (
                "cf266c6da3ccd13ab3793805aa7deedc487284346528eaf94527cd0e78f5ad9d",
            ),
            "torch._inductor.config:coordinate_descent_tuning": (
                "f12f2e8dfd2ba47c6a5bee432dba42c1066b31693023b5b7d18114523ebd91ac",
            ),
        },
    ),
    Patch(
        name="torch: zero_grad of a model that trains",
        why="It walks all modules after each step, for the few parameters that have a gradient.",
        check="swap_zero_grad: does it still do nothing but reset the gradients of the parameters?",
        sources={
            "torch.nn.modules.module:Module.zero_grad": (
                "e2acaefe95021c77747b2c285044f4ef353be47fe223ea47d20ab10322d70f3a",
            )
        },
    ),
    Patch(
        name="accelerate: the search for lomo_optim",
        why="Each step of an optimizer looks for this package in all folders of sys.path, twice.",
        check="forget_lomo: does the step still only ask whether its optimizer is one of that package?",
        sources={
            "accelerate.optimizer:AcceleratedOptimizer.step": (
                "3c449e5cf706c537295d06ed5b8f6c40198e2cdb37fe0307e9468c053f669e1f",
            )
        },
    ),
)
#: Graphs torch may make of the layers, which are one function to it. Beyond its own limit of 8 it gives up in silence.
_MOST_GRAPHS: Final = 64


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextmanager
def without_gpu_sync() -> Iterator[None]:
    """Keep bitsandbytes' optimizers from waiting for the GPU."""
    from bitsandbytes.optim import optimizer

    with _replaced(optimizer, "sync_gpu", lambda tensor: None):
        yield


@contextmanager
def packed_sequences_known() -> Iterator[None]:
    """Keep transformers from looking for the beginnings of packed sequences, for a mask that is not made."""
    from transformers import masking_utils

    with _replaced(masking_utils, "find_packed_sequence_indices", lambda positions: None):
        yield


def mix_into(instance: Any, mixin: type) -> None:
    """Put `mixin` before the class of `instance`, which keeps its name and its state."""
    kind = type(instance)
    instance.__class__ = type(kind.__name__, (mixin, kind), {})


def swap_forward(module: Any, forward: Callable[..., Any]) -> None:
    """Let `module` compute `forward` in the place of its class's; hooks run as before."""
    module.forward = forward


def restore_forward(module: Any) -> None:
    """Undo `swap_forward`."""
    module.__dict__.pop("forward", None)


def swap_zero_grad(model: Any, trained: Any) -> None:
    """Let `model` reset the gradients of `trained` alone, a module that holds all its parameters that train."""
    model.zero_grad = trained.zero_grad


def forget_lomo() -> None:
    """Let nobody look for lomo_optim anymore, whose optimizers are none of ours."""
    sys.modules.setdefault("lomo_optim", None)  # type: ignore[arg-type]  # Python's own way to say: there is none


def configure_compiler(budget: float) -> None:
    """Set what torch.compile does with decoder layers, for the whole process.

    Args:
        budget: The part of a layer's activations that is kept for the backward pass; the cheapest are recomputed.
    """
    import torch

    torch._dynamo.config.recompile_limit = _MOST_GRAPHS
    torch._dynamo.config.optimize_ddp = False  # it would divide graphs that are a layer each already
    # Products in FP8, and bitsandbytes': what is kept is found by both of their passes, and never taken for another's.
    torch._functorch.config.autograd_cache_allow_custom_autograd_functions = True
    torch._functorch.config.activation_memory_budget = budget
    torch._functorch.config.is_non_builtin_to_include = True  # bitsandbytes' products cost something too
    torch._inductor.config.deterministic = True  # a resumed run compiles the same sums, whatever it measures
    torch._inductor.config.combo_kernels = True  # small kernels that do not depend on each other are one


def tune_tiles(wanted: bool) -> None:
    """Set whether torch.compile tries out tiles that change no number: it takes longer than the rest of it."""
    import torch

    torch._inductor.config.coordinate_descent_tuning = wanted
