"""bitsandbytes' quantizers of transformers, for every linear layer that can be quantized, and no other."""

from typing import Any, Final

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

from finetune_trainer.model.architecture import is_plain_linear, linear_modules, read_past

#: transformers' name for 8 bits of every linear layer.
_METHOD: Final = "bitsandbytes-every-linear"


class EveryLinear:
    """Goes before a quantizer of bitsandbytes.

    Linear layers of a class of their own (Falcon) are quantized too; those whose weights the model's code reads itself
    (Mamba's kernels) are not, for it would read packed bytes.
    """

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> None:
        for _, module in linear_modules(model):
            if isinstance(module, torch.nn.Linear) and is_plain_linear(type(module)):
                module.__class__ = torch.nn.Linear
        super()._process_model_before_weight_loading(model, *args, **kwargs)  # type: ignore[misc]

    @staticmethod
    def get_modules_to_not_convert(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Return transformers' own choice, and the layers whose weights are read past them."""
        return [*HfQuantizer.get_modules_to_not_convert(model, *args, **kwargs), *read_past(model)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        # To all others it is a model of bitsandbytes.
        mine: Any = self
        mine.quantization_config.quant_method = model.quantization_method = BitsAndBytesConfig().quant_method
        return super()._process_model_after_weight_loading(model, **kwargs)  # type: ignore[misc]


@register_quantization_config(_METHOD)
class EightBitConfig(BitsAndBytesConfig):  # type: ignore[misc]
    """bitsandbytes' LLM.int8."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(load_in_8bit=True, **settings)
        self.quant_method = _METHOD


@register_quantizer(_METHOD)
class _EightBits(EveryLinear, Bnb8BitHfQuantizer):  # type: ignore[misc]
    """Quantizes linear layers to 8 bits."""
