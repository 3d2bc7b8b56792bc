"""Experts that are one parameter of three dimensions, in 4 bits: quantized as they load, dequantized when read.

bitsandbytes quantizes linear layers alone. Each expert's matrix is quantized here as bitsandbytes would (QLoRA,
arXiv:2305.14314): the same bytes, the same scales. A parametrization of torch stands in the parameter's place, so that
whoever reads it (transformers' own experts, PEFT) gets the dequantized numbers.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name

from finetune_trainer.model.every_linear import EveryLinear
from finetune_trainer.model.finite import note_sum
from finetune_trainer.runtime.patches import restore_forward, swap_forward

#: transformers' name for 4 bits of linear layers and of experts.
_METHOD: Final = "bitsandbytes-with-experts"
#: Weights of one scale: what bitsandbytes takes for linear layers.
_BLOCK: Final = 64
#: Scales of one scale of scales.
SCALES_OF_A_BLOCK: Final = 256
#: transformers' name of the implementation of model.grouped_experts.
GROUPED: Final = "finetune_grouped"
#: What may dequantize experts besides bitsandbytes.
KERNEL: Final = "kernel"
#: The parameters of experts that transformers leaves to an implementation of our choice.
MATRICES: Final = ("gate_up_proj", "up_proj", "down_proj")


def is_experts(module: Any) -> bool:
    """Return whether `module` holds experts in the form of which transformers lets one choose the implementation."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_gate", "num_experts", "_apply_gate"))


def fits(weight: torch.Tensor) -> bool:
    """Return whether each matrix of `weight` [experts, rows, columns] is of whole blocks."""
    return weight.dim() == 3 and weight[0].numel() % _BLOCK == 0


def experts_of(model: Any) -> Iterator[tuple[Any, str, torch.Tensor]]:
    """Yield each experts' module of `model`, and the name and the value of each of its parameters to be quantized."""
    for module in model.modules():
        if is_experts(module):
            for name in MATRICES:
                if isinstance(weight := module._parameters.get(name), torch.Tensor) and fits(weight):
                    yield module, name, weight


class Quantized(torch.nn.Module):
    """The scales of experts' weights in 4 bits; called with the packed weights, it returns them dequantized.

    Attributes:
        shape: [experts, rows, columns].
        dtype: The type in which experts compute.
        method: What dequantizes them: see `dequantize`.
    """

    code: torch.Tensor

    def __init__(self, shape: torch.Size, dtype: torch.dtype, states: list[QuantState]) -> None:
        super().__init__()
        self.shape, self.dtype, self.method = list(shape), dtype, states[0].quant_type
        scales = [torch.stack([each.absmax for each in states])]
        if states[0].nested:
            scales += [
                states[0].state2.code,
                torch.stack([each.state2.absmax for each in states]),
                torch.stack([each.offset for each in states]),
            ]
        self._count = len(scales)
        for place, each in enumerate(scales):
            self.register_buffer(f"scales{place}", each, persistent=False)
        self.register_buffer("code", states[0].code, persistent=False)

    @property
    def scales(self) -> list[torch.Tensor]:
        """[experts, blocks]; or, quantized once more, indices into the second, times the third, plus the fourth."""
        return [getattr(self, f"scales{place}") for place in range(self._count)]

    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        return dequantize(packed, self.scales, self.code, self.shape, self.dtype, self.method)


def dequantize(
    packed: torch.Tensor,
    scales: list[torch.Tensor],
    code: torch.Tensor,
    shape: list[int],
    dtype: torch.dtype,
    method: str,
) -> torch.Tensor:
    """Return experts' weights in `dtype`.

    `method`: KERNEL is that of engine.kernels.dequantize; nf4 and fp4 are bitsandbytes' of that type, whose scales of
    scales are applied by plain arithmetic.
    """
    packed = packed.view(torch.uint8)
    if method == KERNEL:
        return torch.ops.finetune.dequantize_4bit(packed, scales, code, shape, dtype)  # type: ignore[no-any-return]
    absmax, *nested = scales
    if nested:
        values, of_scales, offset = nested
        blocks = of_scales.repeat_interleave(SCALES_OF_A_BLOCK, -1)[:, : absmax.shape[1]]
        absmax = values[absmax.int()] * blocks + offset[:, None]
    rows = torch.Size((absmax.numel(), _BLOCK))  # whatever the width: bitsandbytes errs on CPUs for less than a block
    state = QuantState(absmax.flatten(), rows, code, _BLOCK, method, dtype)
    return dequantize_4bit(packed.view(-1, 1), state).view(shape)  # type: ignore[no-any-return]


def quantize(weight: torch.Tensor, quant_type: str, twice: bool, dtype: torch.dtype) -> tuple[torch.Tensor, Quantized]:
    """Return `weight` [experts, rows, columns] in 4 bits, two to a byte [experts, bytes], and its scales.

    Args:
        weight: Its type is the one it was stored in, as for linear layers.
        quant_type: nf4 or fp4.
        twice: Whether scales are quantized too (double quantization).
        dtype: What it will be dequantized to.
    """
    packed = weight.new_empty(weight.shape[0], weight[0].numel() // 2, dtype=torch.uint8)
    states = []
    for place, matrix in enumerate(weight):
        found, state = quantize_4bit(
            matrix.contiguous(), blocksize=_BLOCK, compress_statistics=twice, quant_type=quant_type
        )
        packed[place] = found.view(-1)
        states.append(state)
    return packed, Quantized(weight.shape, dtype, states)


def quantized(module: Any, name: str) -> tuple[torch.Tensor, Quantized] | None:
    """Return the packed weights and the scales of the parameter `name`, None where it is not read as they are."""
    if not parametrize.is_parametrized(module, name):
        return None
    found = module.parametrizations[name]
    return (found.original, found[0]) if len(found) == 1 and isinstance(found[0], Quantized) else None


def keep_dequantized(layers: list[Any]) -> None:
    """Replace the 4-bit experts in `layers` with plain parameters of the same numbers."""
    for layer in layers:
        for module in layer.modules():
            for name in MATRICES if is_experts(module) else ():
                if quantized(module, name):
                    weight = getattr(module, name)
                    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
                    setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))


@contextmanager
def attaching_adapters(model: Any) -> Iterator[None]:
    """Show 4-bit experts as plain parameters, without numbers, while PEFT attaches adapters to `model`.

    PEFT nests the adapters of parametrized experts in another order: they would have each other's names. Afterwards the
    adapters on experts hand their matrices to the experts' implementation, if it is ours.
    """
    hidden = []
    for module in [each for each in model.modules() if is_experts(each)]:
        if shown := {name: getattr(module, name) for name in MATRICES if quantized(module, name)}:
            hidden.append((module, type(module), module._modules.pop("parametrizations"), list(shown)))
            module.__class__ = type(module).__base__
            for name, weight in shown.items():
                zeros = weight.new_zeros(()).expand(weight.shape)
                module.register_parameter(name, torch.nn.Parameter(zeros, requires_grad=False))
    try:
        yield
    finally:
        for module, kind, parametrizations, names in hidden:
            for name in names:
                del module._parameters[name]
            module.__class__, module._modules["parametrizations"] = kind, parametrizations
    for module in model.modules():
        if isinstance(module, ParamWrapper) and is_experts(module.get_base_layer()) and module.num_experts > 1:
            restore_forward(module)
            swap_forward(module, functools.partial(_hand_on, module, module.forward))


def _hand_on(wrapper: Any, plain: Any, *args: Any, adapters: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    if wrapper.get_base_layer().config._experts_implementation != GROUPED:
        return plain(*args, **kwargs)
    mine = {} if wrapper.disable_adapters or wrapper.merged else {wrapper.parameter_name: wrapper}
    return wrapper.base_layer(*args, adapters={**(adapters or {}), **mine}, **kwargs)


@register_quantization_config(_METHOD)
class ExpertsConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes' settings, for a model whose experts are quantized too.

    Attributes:
        quantize_on: The device that quantizes, and looks for NaN; a processor takes hours for a large model. By default
            the one that the weights are loaded to.
    """

    def __init__(self, *, quantize_on: str | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.quant_method, self.quantize_on = _METHOD, quantize_on


@register_quantizer(_METHOD)
class _Quantizer(EveryLinear, Bnb4BitHfQuantizer):  # type: ignore[misc]
    """Quantizes experts layer by layer, as transformers loads them: there is never more than one in both forms."""

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        module, name = get_module_from_name(model, param_name)
        if is_experts(module) and name in MATRICES:
            return fits(getattr(module, name))
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def get_quantize_ops(self) -> Any:
        return _QuantizeExperts(super().get_quantize_ops(), self.quantization_config)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for module in [module for module in model.modules() if is_experts(module)]:
            for name in MATRICES:
                scales = getattr(module._parameters.get(name), "scales_of_experts", None)
                if scales is not None:
                    parametrize.register_parametrization(module, name, scales, unsafe=True)
        return super()._process_model_after_weight_loading(model, **kwargs)


class _QuantizeExperts(ConversionOps):  # type: ignore[misc]
    def __init__(self, linear: Any, settings: ExpertsConfig) -> None:
        self._linear, self._settings = linear, settings

    def convert(self, input_dict: dict[str, Any], model: Any = None, **kwargs: Any) -> dict[str, Any]:
        weights = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        target = next(iter(weights.values())).device
        weights = {key: each.to(self._settings.quantize_on or target) for key, each in weights.items()}
        for each in weights.values():
            note_sum(model, each)
        module, name = get_module_from_name(model, next(iter(weights)))
        if is_experts(module) and name in MATRICES:
            return {key: self._quantized(each, target) for key, each in weights.items()}
        found = self._linear.convert(weights, model=model, **kwargs)
        return {key: each if each.device == target else each.to(target) for key, each in found.items()}

    def _quantized(self, weight: torch.Tensor, device: torch.device) -> torch.nn.Parameter:
        settings = self._settings
        packed, scales = quantize(
            weight,
            settings.bnb_4bit_quant_type,
            settings.bnb_4bit_use_double_quant,
            settings.bnb_4bit_compute_dtype,
        )
        packed = packed.to(device).view(settings.bnb_4bit_quant_storage)
        parameter: Any = torch.nn.Parameter(packed, requires_grad=False)
        parameter.scales_of_experts = scales.to(device)
        return parameter  # type: ignore[no-any-return]
