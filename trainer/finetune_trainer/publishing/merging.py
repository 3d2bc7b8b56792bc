"""Merge an adapter into its base model's weights: tensor by tensor, so that no more than one shard is ever in memory.

What comes of it computes what was trained: weights that training quantized are quantized here in the same way, and the
adapter is added in float32 to what they stand for.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from finetune_api import constants
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_training import Lora
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.architecture import layout
from finetune_trainer.model.base import BaseModel
from finetune_trainer.model.experts import is_experts
from finetune_trainer.model.weights import quantization_config
from finetune_trainer.runtime.precision import torch_dtype

INDEX_FILE: Final = "model.safetensors.index.json"
#: Bytes of one file of weights; saving one takes twice as much memory.
SHARD_BYTES: Final = 2 << 30
#: How PEFT begins the names of what it saves.
_PREFIX: Final = "base_model.model."
_PARTS: Final = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")


class CannotMerge(ConfigInvalid):
    """This adapter cannot be merged into this base model."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a checkpoint: the file that holds it, and its shape."""

    file: Path
    shape: tuple[int, ...]


def tensors_of(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of the safetensors files in `folder`, by name, in the files' order. Reads no weights."""
    found: dict[str, TensorInfo] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- no mapping
                found[name] = TensorInfo(file, tuple(opened.get_slice(name).get_shape()))
    return found


def output_dtype(spec: FineTuneJobSpec) -> torch.dtype:
    """Return the 16-bit type of merged weights: training's, bfloat16 where that has 32."""
    return torch.float16 if torch_dtype(spec.training.precision) is torch.float16 else torch.bfloat16


def check_mergeable(weights: Path, base: BaseModel, spec: FineTuneJobSpec) -> None:
    """Raise CannotMerge, with the reason, if the job's adapter cannot be merged into the weights in `weights`."""
    if base.quantized:
        raise CannotMerge(
            f"the weights of {spec.model.source} are stored in 4 bits: take the original model as model.source"
        )
    if spec.model.trust_remote_code:
        raise CannotMerge("a model with code of its own (model.trustRemoteCode) is not merged")
    if base.new_tokens.ids:
        raise CannotMerge("an adapter with tokens of its own (dataset.addTokens) is not merged")
    if spec.quantization.bits == 4 and any(map(is_experts, layout(base.config, spec).modules())):
        raise CannotMerge(
            "the experts were trained in 4 bits, all of a layer together, and are stored one by one: a merge would"
            " compute something else; take quantization.bits: 16"
        )
    known = tensors_of(weights)
    for name in base.tensors:
        target = _target(name)
        if target not in known:
            raise CannotMerge(
                f"the adapter changes {target}, and the weights of {spec.model.source} hold no tensor of that name:"
                f" models of type {base.config.model_type} store these weights in another form"
            )


class Merger:
    """Gives the merged weights of a base model, one tensor at a time."""

    def __init__(
        self,
        weights: Path,
        adapter: Path,
        base: BaseModel,
        spec: FineTuneJobSpec,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Prepare to merge.

        Args:
            weights: The base model's folder, weights included.
            adapter: The adapter's folder.
            base: What is known of the base model.
            spec: The job: how weights were quantized, and the adapter's scale.
            device: torch's name of the device to compute on; training's, so that quantization is the same.
            dtype: What the merged weights are rounded to; default: output_dtype.
        """
        check_mergeable(weights, base, spec)
        self.tensors = tensors_of(weights)
        self.dtype = dtype or output_dtype(spec)
        self._spec = spec
        self._device = device
        self._quantized = quantized_layers(base, spec)
        self._transposed = bool(getattr(base.adapter, "fan_in_fan_out", False)) or _is_conv1d(base, spec)
        self._adapter = _AdapterFile(adapter / constants.ADAPTER_WEIGHTS_FILE)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor of the model, merged, on the CPU.

        Raises:
            CannotMerge: The adapter holds more than was merged.
        """
        unused = set(self._adapter.names)
        with ExitStack() as files:
            opened: dict[Path, Any] = {}
            for name, info in self.tensors.items():
                if info.file not in opened:
                    files.close()  # the last file's pages
                    opened = {info.file: files.enter_context(safe_open(info.file, "pt"))}
                used = [key for key in self._adapter.names_for(name) if key in unused]
                unused.difference_update(used)
                yield name, self._merged(name, opened[info.file].get_tensor(name), used)
        if unused:
            raise CannotMerge(f"the adapter holds {min(unused)}, for which the base model has no place")

    def _merged(self, name: str, tensor: torch.Tensor, keys: list[str]) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        layer = name.removesuffix(".weight")
        trained = self._as_trained(tensor, layer in self._quantized and name.endswith(".weight"))
        parts = {key.removeprefix(_PREFIX + layer): self._adapter.read(key).to(self._device).float() for key in keys}
        if _PARTS[0] in parts:
            trained = self._adapted(trained.float(), parts)
        elif parts:  # saved whole: modulesToSave, biases
            trained = next(iter(parts.values()))
        return trained.to(self.dtype).cpu().contiguous()

    def _adapted(self, weight: torch.Tensor, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return weight + scale * B @ A; with DoRA each row then has the length that was learned."""
        delta = parts[_PARTS[1]] @ parts[_PARTS[0]] * scale_of(self._spec.lora)
        if self._transposed:
            delta = delta.T
        merged = weight + delta
        if _PARTS[2] in parts:
            rows = merged.T if self._transposed else merged
            lengths = torch.linalg.norm(rows, dim=1)
            rows = rows * (parts[_PARTS[2]].flatten() / lengths)[:, None]
            merged = rows.T if self._transposed else rows
        return merged

    def _as_trained(self, tensor: torch.Tensor, quantized: bool) -> torch.Tensor:
        """Return the weights that training computed with."""
        bits, precision = self._spec.quantization.bits, torch_dtype(self._spec.training.precision)
        if bits == 16:
            return tensor.to(self._device, torch_dtype(self._spec.quantization.compute_dtype))
        weight = tensor.to(self._device, precision)
        if not quantized:
            return weight
        return _through_4_bits(weight, self._spec) if bits == 4 else _through_8_bits(weight)


def scale_of(lora: Lora) -> float:
    """Return what PEFT multiplies an adapter's product with."""
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def quantized_layers(base: BaseModel, spec: FineTuneJobSpec) -> frozenset[str]:
    """Return the names of the layers that transformers quantizes when it loads the base model for `spec`."""
    settings = quantization_config(spec)
    if settings is None:
        return frozenset()
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers.quantizers import AutoHfQuantizer

    skeleton = layout(base.config, spec)
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    with torch.device("meta"):
        quantizer.preprocess_model(skeleton, dtype=torch_dtype(spec.training.precision), device_map={"": "cpu"})
    return frozenset(name for name, module in skeleton.named_modules() if isinstance(module, Linear4bit | Linear8bitLt))


def write_shards(
    merged: Merger, folder: Path, on_shard: Callable[[int, int], object] = lambda done, total: None
) -> int:
    """Write the weights to `folder`, in files of at most SHARD_BYTES, with their index; return their bytes."""
    size = merged.dtype.itemsize
    plan: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, info in merged.tensors.items():
        needed = math.prod(info.shape) * size
        if plan[-1] and needed > room:
            plan.append([])
            room = SHARD_BYTES
        plan[-1].append(name)
        room -= needed
    tensors, total = iter(merged), 0
    where: dict[str, str] = {}
    for number, names in enumerate(plan, start=1):
        file = _shard_name(number, len(plan))
        shard = dict(next(tensors) for _ in names)
        save_file(shard, folder / file, {"format": "pt"})
        total += sum(tensor.nbytes for tensor in shard.values())
        where |= dict.fromkeys(names, file)
        del shard
        on_shard(number, len(plan))
    next(tensors, None)  # says whether all of the adapter was merged
    if len(plan) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _shard_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number:05}-of-{total:05}.safetensors"


class _AdapterFile:
    """The adapter's tensors, read when they are needed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with safe_open(file, "pt") as opened:
            self.names = tuple(opened.keys())
        self._by_target: dict[str, list[str]] = {}
        for name in self.names:
            self._by_target.setdefault(_target(name), []).append(name)

    def names_for(self, tensor: str) -> list[str]:
        """Return the names of what changes a tensor of the base model."""
        return self._by_target.get(tensor, [])

    def read(self, name: str) -> torch.Tensor:
        with safe_open(self._file, "pt") as opened:
            found: torch.Tensor = opened.get_tensor(name)
            return found


def _target(name: str) -> str:
    """Return the name of the base model's tensor that a tensor of the adapter changes."""
    plain = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
    for part in _PARTS:
        if plain.endswith(part):
            return plain.removesuffix(part) + ".weight"
    return plain


def _is_conv1d(base: BaseModel, spec: FineTuneJobSpec) -> bool:
    """Return whether the adapted layers are GPT-2's, which hold their weights transposed."""
    from transformers.pytorch_utils import Conv1D

    modules = dict(layout(base.config, spec).named_modules())
    return any(isinstance(modules.get(_target(name).removesuffix(".weight")), Conv1D) for name in base.tensors)


def _through_4_bits(weight: torch.Tensor, spec: FineTuneJobSpec) -> torch.Tensor:
    import bitsandbytes

    settings = spec.quantization
    packed = bitsandbytes.nn.Params4bit(
        weight.cpu(), requires_grad=False, quant_type=settings.type, compress_statistics=settings.double_quant
    ).to(weight.device)
    if packed.quant_state is None:  # on the CPU, moving it there does nothing
        packed = packed._quantize(weight.device)
    found: torch.Tensor = bitsandbytes.functional.dequantize_4bit(packed.data, packed.quant_state)
    return found.to(weight.dtype)


def _through_8_bits(weight: torch.Tensor) -> torch.Tensor:
    """LLM.int8: each row times 127 over its largest value, rounded."""
    rows = weight.to(torch.float16).float()
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    return (torch.round(rows / scale.clamp(min=torch.finfo(torch.float32).tiny)) * scale).to(weight.dtype)
