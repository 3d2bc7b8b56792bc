"""4-bit weights kept dequantized where memory allows: the same numbers, without computing them in every pass."""

from typing import Any

import torch

from finetune_trainer.engine.layers import replace


def keep_dequantized(layers: list[Any]) -> None:
    """Put a plain linear layer with the same numbers in the place of each 4-bit one of `layers`."""
    from bitsandbytes.nn import Linear4bit

    replace(layers, lambda module: isinstance(module, Linear4bit), dequantized)


def dequantized(linear: Any) -> torch.nn.Linear:
    """A frozen linear layer that computes what the 4-bit `linear` does, in its compute type."""
    from bitsandbytes.functional import dequantize_4bit

    dtype = linear.compute_dtype or linear.weight.quant_state.dtype
    weight = dequantize_4bit(linear.weight.data, linear.weight.quant_state).to(dtype)
    plain = _Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        plain.bias = torch.nn.Parameter(linear.bias.data.to(dtype), requires_grad=False)
    return plain.train(linear.training)


class _Linear(torch.nn.Linear):
    """Computes in its weight's type and answers in its input's, as a 4-bit layer of bitsandbytes does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)
