"""FSDP-QLoRA: shard the frozen weights of the decoder layers over the ranks, where no GPU can hold them all.

torch's fully_shard gathers a layer while it computes, also in 4 bits, and frees it afterwards. Trained weights,
embeddings and head stay whole on every rank: the adapter's gradients are summed as without sharding, and optimizers,
checkpoints and losses are the same, bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from finetune_trainer.engine import modules
from finetune_trainer.settings import Ranks


def shard(model: Any, ranks: Ranks, device: str) -> Sequence[Any]:
    """Shard the frozen base with FSDP2, layer by layer, from CPU memory, and return those layers.

    The device never holds more than one layer whole.

    Args:
        model: The PEFT model, in host memory.
        ranks: This process among the others.
        device: torch's name of the device that the rest goes to.

    Raises:
        ConfigInvalid: When the model does not name its layers.
    """
    core = model.get_base_model()
    layers = modules.repeated_layers(core, core._no_split_modules)
    remove_hook_from_submodules(core)  # they would take inputs to where the weights were loaded
    mesh = init_device_mesh(torch.device(device).type, (ranks.size,))
    for layer in layers:
        layer.to(device)
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})
    inside = {module for layer in layers for module in layer.modules()}
    for module in core.modules():
        if module not in inside:
            _move(module, device)
    for layer, following in pairwise(layers):
        # Else its gather begins when the host gets there, and the GPU waits where the host is behind.
        layer.set_modules_to_forward_prefetch([following])
    # The whole model too, though no weight is left to shard: that is what gathers layers ahead in the backward pass.
    fully_shard(core, mesh=mesh, ignored_params={p for p in core.parameters() if not isinstance(p, DTensor)})
    if getattr(core, "hf_device_map", None):  # accelerate compares it with the device it trains on
        core.hf_device_map = {"": device}
    return layers


@contextmanager
def gathered(layer: Any) -> Iterator[None]:
    """Hold the weights of `layer` whole for this block, where it is sharded. Every rank must do so."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def _move(module: Any, device: str) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
