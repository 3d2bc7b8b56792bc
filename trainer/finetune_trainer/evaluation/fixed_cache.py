"""A cache of keys and values that stay where they are, and the attention of one new token over it."""

from typing import Any, Final

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

#: The attention's name in transformers.
NAME: Final = "finetune_decode"


class DecodingUnsupported(Exception):
    """This model cannot be decoded here; the message says why."""


class FixedCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers, [rows, heads, length, head_dim]; each step writes at `cursor`."""

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self._rows, self._length = rows, length
        self.cursor = torch.zeros(1, dtype=torch.int64, device=device)
        self._tensors: list[tuple[torch.Tensor, torch.Tensor]] = []

    def fill(self, first_row: int, prefilled: DynamicCache, width: int) -> None:
        """Take over the prompts' keys and values."""
        for index, layer in enumerate(prefilled.layers):
            if type(layer) is not DynamicLayer or layer.keys.shape[2] != width:
                raise DecodingUnsupported(f"layer {index} does not keep the keys of all tokens")
            if index == len(self._tensors):
                self._tensors.append((self._empty(layer.keys), self._empty(layer.values)))
            for whole, part in zip(self._tensors[index], (layer.keys, layer.values), strict=True):
                whole[first_row : first_row + len(part), :, :width] = part

    def _empty(self, like: torch.Tensor) -> torch.Tensor:
        return like.new_zeros(self._rows, like.shape[1], self._length, like.shape[3])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._tensors[layer_idx]
        keys.index_copy_(2, self.cursor, key_states)
        values.index_copy_(2, self.cursor, value_states)
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the length of the tensors. Positions and masks do not depend on it: the step gives both."""
        return self._length


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Compute one token's attention as transformers asks for it (AttentionInterface).

    The query heads that share a key are computed as if they were tokens, so that keys are read once and never repeated.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise DecodingUnsupported("its attention has a soft cap, sinks or a position bias")
    if query.shape[2] != 1 or attention_mask is None or attention_mask.shape[-1] != key.shape[2]:
        raise DecodingUnsupported("its attention is not asked for one token over the whole cache")
    if sliding_window is not None and sliding_window < key.shape[2]:
        raise DecodingUnsupported(f"its attention sees {sliding_window} tokens alone")
    rows, heads, _, head_dim = query.shape
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], head_dim).to(key.dtype)
    mask = attention_mask.to(key.dtype)
    found = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[3]), None
