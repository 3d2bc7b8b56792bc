"""FSDP-QLoRA: shard the frozen weights of the decoder layers over the ranks, where no GPU can hold them all.

As ZeRO's third stage (arXiv:1910.02054), for weights that no optimizer changes: each rank keeps its part of a layer's
bytes. Two buffers hold the layer that computes, and the one that comes next, which is gathered meanwhile. torch's
fully_shard copies weights into and out of what it sends, and makes new parameters each time: the host took so long that
GPUs waited for it. Trained weights, embeddings and head stay whole on every rank: the adapter's gradients are summed as
without sharding, and optimizers, checkpoints and losses are the same, bit for bit.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import distributed
from torch.utils._pytree import tree_leaves

from finetune_trainer.engine import modules
from finetune_trainer.settings import Ranks

#: Weights begin at multiples of so many bytes: compiled kernels count on 16.
_ALIGNMENT: Final = 256


def shard(model: Any, ranks: Ranks, device: str) -> Sequence[Any]:
    """Shard the frozen base layer by layer, from CPU memory, and return those layers.

    The device never holds more than three layers whole.

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
    shards = LayerShards(layers, ranks, device)
    inside = {module for layer in layers for module in layer.modules()}
    for module in core.modules():
        if module not in inside:
            _move(module, device)
    core.hf_device_map = {"": device}  # transformers moves nothing, then, and accelerate finds the device it trains on
    for index, layer in enumerate(layers):
        layer.shards = shards
        layer.register_forward_pre_hook(partial(shards.before_forward, index))
        layer.register_forward_hook(partial(shards.after_forward, index))
    return layers


def is_sharded(model: Any) -> bool:
    """Return whether layers of `model` are sharded."""
    return any("shards" in vars(module) for module in model.modules())


@contextmanager
def gathered(layer: Any) -> Iterator[None]:
    """Hold the weights of `layer` whole for this block, where it is sharded. Every rank must do so."""
    if "shards" in vars(layer):
        layer.shards.gather(layer)
    yield


class LayerShards:
    """This rank's part of the weights of each layer, and where they are gathered.

    Ranks gather the same layers in the same order, whatever each has in its buffers: a pass of the model does so, and
    `gather`. A layer's backward pass finds the weights of its forward pass: autograd need not know that they were gone.
    """

    def __init__(self, layers: Sequence[Any], ranks: Ranks, device: str) -> None:
        """Move `layers` to `device`, and keep this rank's part of their frozen weights there."""
        self._layers = list(layers)
        uses = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
        of_several = {key for key, count in uses.items() if count > 1}  # they stay whole
        multiple = _ALIGNMENT * ranks.size
        sizes = [
            _up(sum(_up(each.nbytes, _ALIGNMENT) for each in _frozen(layer, of_several)), multiple) for layer in layers
        ]
        #: Layers take turns: what a layer leaves is overwritten by the next but one.
        self._buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        #: The layer in each buffer, and its gather while nobody has waited for it.
        self._holds: list[int | None] = [None, None]
        self._pending: list[Any] = [None, None]
        #: Of each layer: this rank's bytes, and the part of its buffer that they all fill.
        self.parts: list[torch.Tensor] = []
        self._whole: list[torch.Tensor] = []
        #: Its parameters, and where in memory they lie.
        self._places: list[list[tuple[torch.Tensor, int]]] = []
        for index, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
            layer.to(device)
            buffer, begin = self._buffers[index % 2], 0
            places = []
            for parameter in _frozen(layer, of_several):
                place = buffer[begin : begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
                parameter.data = place.copy_(parameter.data)
                places.append((parameter, place.data_ptr()))
                begin += _up(parameter.nbytes, _ALIGNMENT)
            self._places.append(places)
            part = size // ranks.size
            self.parts.append(buffer[ranks.rank * part :][:part].clone())
            # Weights that autograd has saved are not told that they change.
            self._whole.append(buffer[:size].data)

    def gather(self, layer: Any) -> None:
        """Have the weights of `layer` whole for the kernels that are launched from here on. A collective."""
        self._gather(self._layers.index(layer))

    def before_forward(self, index: int, *_: Any) -> None:
        """Gather a layer, and begin with the next one: the layer before is through."""
        self._gather(index)
        if index + 1 < len(self._layers):
            self._begin(index + 1)

    def after_forward(self, index: int, _module: Any, _inputs: Any, outputs: Any) -> None:
        """Gather the layer once more before its backward pass, and begin with the one below."""
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and output.requires_grad:
                output.register_hook(partial(self._before_backward, index))

    def _before_backward(self, index: int, _gradient: torch.Tensor) -> None:
        self._gather(index)
        if index:
            self._begin(index - 1)

    def _gather(self, index: int) -> None:
        if any(parameter.data_ptr() != place for parameter, place in self._places[index]):
            raise RuntimeError(f"weights of layer {index} are not where they are gathered: something has moved them")
        self._begin(index)
        self._wait(index % 2)

    def _begin(self, index: int) -> None:
        """Send this rank's part of a layer, unless its buffer holds it: after all kernels that were launched so far."""
        place = index % 2
        if self._holds[place] == index:
            return
        self._wait(place)
        self._holds[place] = index
        self._pending[place] = distributed.all_gather_into_tensor(self._whole[index], self.parts[index], async_op=True)

    def _wait(self, place: int) -> None:
        if self._pending[place]:
            self._pending[place].wait()
            self._pending[place] = None


def _frozen(layer: Any, but: Collection[int]) -> list[torch.Tensor]:
    return [each for each in layer.parameters() if not each.requires_grad and id(each) not in but]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _move(module: Any, device: str) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
