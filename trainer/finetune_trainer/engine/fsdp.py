"""FSDP-QLoRA: shard the frozen weights of the decoder layers over the ranks, where no GPU can hold them all.

As ZeRO's third stage (arXiv:1910.02054), for weights that no optimizer changes: each rank keeps its part of a layer's
bytes. Two buffers hold the layer that computes, and the one that comes next, which is gathered meanwhile. torch's
fully_shard copies weights into and out of what it sends, and makes new parameters each time: the host took so long that
GPUs waited for it. Trained weights, embeddings and head stay whole on every rank: the adapter's gradients are summed as
without sharding, and optimizers, checkpoints and losses are the same, bit for bit.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Final

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import distributed
from torch.utils._pytree import tree_leaves

from finetune_trainer.engine import modules
from finetune_trainer.errors import ConfigInvalid
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
    inside = {module for layer in layers for module in layer.modules()}
    outside = [module for module in core.modules() if module not in inside]
    of_others = {id(parameter) for module in outside for parameter in module.parameters(recurse=False)}
    shards = LayerShards(layers, ranks, device, of_others)
    for module in outside:
        _move(module, device)
    core.hf_device_map = {"": device}  # transformers moves nothing, then, and accelerate finds the device it trains on
    for index, layer in enumerate(layers):
        layer.shards = shards
        layer.register_forward_pre_hook(partial(shards.before_forward, index), with_kwargs=True)
        layer.register_forward_hook(partial(shards.after_forward, index))
    return layers


def is_sharded(model: Any) -> bool:
    """Return whether layers of `model` are sharded."""
    return any("shards" in vars(module) for module in model.modules())


def gather(layer: Any) -> None:
    """Have the weights of `layer` whole until another is gathered, where it is sharded. Every rank must do so."""
    if "shards" in vars(layer):
        layer.shards.gather(layer)


class LayerShards:
    """This rank's part of the weights of each layer, and where they are gathered.

    Ranks gather the same layers in the same order, whatever each has in its buffers: a pass of the model does so, and
    `gather`. A layer's backward pass finds the weights of its forward pass: autograd need not know that they were gone.
    """

    def __init__(self, layers: Sequence[Any], ranks: Ranks, device: str, of_others: Collection[int] = ()) -> None:
        """Move `layers` to `device`, and keep this rank's part of their frozen weights there.

        Weights of several layers stay whole, and those that other modules have too, whose ids are `of_others`.
        """
        self._layers = list(layers)
        uses = Counter(id(parameter) for layer in layers for parameter in layer.parameters())
        stay = {key for key, count in uses.items() if count > 1} | set(of_others)
        multiple = _ALIGNMENT * ranks.size
        sizes = [
            _up(sum(_up(owner[name].nbytes, _ALIGNMENT) for owner, name in _frozen(layer, stay)), multiple)
            for layer in layers
        ]
        #: Layers take turns: what a layer leaves is overwritten by the next but one.
        self._buffers = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        #: The layer in each buffer, and its gather while nobody has waited for it.
        self._holds: list[int | None] = [None, None]
        self._pending: list[Any] = [None, None]
        #: Of each layer: this rank's bytes, and the part of its buffer that they all fill.
        self.parts: list[torch.Tensor] = []
        self._whole: list[torch.Tensor] = []
        #: Its parameters, each by the dictionary of its module and its name there, and where in memory they lie.
        self._places: list[list[tuple[dict[str, Any], str, int]]] = []
        #: What needs a gradient of the inputs of the layer that computes, by id, and how often it was changed in place.
        self._given: dict[int, int] = {}
        for index, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
            layer.to(device)
            buffer, begin = self._buffers[index % 2], 0
            places = []
            for owner, name in _frozen(layer, stay):
                parameter = owner[name]
                place = buffer[begin : begin + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
                parameter.data = place.copy_(parameter.data)
                places.append((owner, name, place.data_ptr()))
                begin += _up(parameter.nbytes, _ALIGNMENT)
            self._places.append(places)
            part = size // ranks.size
            self.parts.append(buffer[ranks.rank * part :][:part].clone())
            # Weights that autograd has saved are not told that they change.
            self._whole.append(buffer[:size].data)

    def gather(self, layer: Any) -> None:
        """Have the weights of `layer` whole for the kernels that are launched from here on. A collective."""
        self._gather(self._layers.index(layer))

    def before_forward(self, index: int, _module: Any, args: Any, kwargs: Any) -> None:
        """Gather a layer, and begin with the next one: the layer before is through."""
        if torch.is_grad_enabled():
            self._given = {id(each): each._version for each in _tensors((args, kwargs)) if each.requires_grad}
        self._gather(index)
        if index + 1 < len(self._layers):
            self._begin(index + 1)

    def after_forward(self, index: int, _module: Any, _inputs: Any, outputs: Any) -> None:
        """Have the layer gathered once more before its backward pass, and begin with the one below then.

        What a layer only hands on belongs to one below: its gradient is there when that one is already at work.
        """
        if not torch.is_grad_enabled():
            return
        found = _tensors(outputs)
        if not found:
            raise ConfigInvalid(
                f"spec.model.source: no tensor is found in the {type(outputs).__name__} that a decoder layer"
                " returns, so that this model cannot be sharded over GPUs; take a GPU that holds all of it"
            )
        for output in found:
            if output.requires_grad and self._given.get(id(output)) != output._version:
                output.register_hook(partial(self._before_backward, index))
        self._given = {}

    def _before_backward(self, index: int, _gradient: torch.Tensor) -> None:
        self._gather(index)
        if index:
            self._begin(index - 1)

    def _gather(self, index: int) -> None:
        if any(owner[name].data_ptr() != place for owner, name, place in self._places[index]):
            raise RuntimeError(f"weights of layer {index} are not where they are gathered: something has moved them")
        self._begin(index)
        self._wait(index % 2)

    def _begin(self, index: int) -> None:
        """Send this rank's part of a layer, unless its buffer holds it: after all kernels that were launched so far."""
        place = index % 2
        if self._holds[place] == index:
            return
        self._wait(place)
        self._holds[place] = None  # while that may fail
        self._pending[place] = distributed.all_gather_into_tensor(self._whole[index], self.parts[index], async_op=True)
        self._holds[place] = index

    def _wait(self, place: int) -> None:
        if self._pending[place]:
            self._pending[place].wait()
            self._pending[place] = None


def _frozen(layer: Any, but: Collection[int]) -> list[tuple[dict[str, Any], str]]:
    """Return where the frozen parameters of `layer` are found, each once: the dictionary of a module, and a name."""
    found: dict[int, tuple[dict[str, Any], str]] = {}
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad and id(parameter) not in but:
                found.setdefault(id(parameter), (module._parameters, name))
    return list(found.values())


def _tensors(values: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _move(module: Any, device: str) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
        if (state := getattr(parameter, "quant_state", None)) is not None:
            state.to(device)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(device)
