"""A cache of keys and values that stay where they are, and the attention of one new token over it."""

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from transformers import AttentionInterface, Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

#: The attention's name in transformers.
NAME: Final = "finetune_decode"


class DecodingUnsupported(Exception):
    """This model cannot be decoded here; the message says why."""


class FixedCache(Cache):  # type: ignore[misc]
    """Keys and values of all layers, [rows, heads, length, head_dim]; each step writes at `cursor`.

    Attributes:
        starts: Where each row's first token lies [rows].
        cursor: Where the newest token of all rows lies [1].
        mask: Added to attention's products, 0 or -inf, [rows, 1, 1, length]: it says the same as the other two.
    """

    def __init__(self, rows: int, length: int, starts: torch.Tensor) -> None:
        super().__init__(layers=[])
        self._rows, self._length = rows, length
        self.starts = starts
        self.cursor = torch.zeros(1, dtype=torch.int64, device=starts.device)
        self.mask = torch.full((rows, 1, 1, length), -torch.inf, device=starts.device)
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def fill(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor, rows: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Write the keys and values of prompts, [rows of a pass, heads, tokens, head_dim], of token after token.

        Args:
            layer: Which layer's they are.
            keys: Those of all tokens of the pass.
            values: Likewise.
            rows: Which row here each token is written to [rows of the pass, tokens or 1].
            places: And where [rows of the pass, tokens].
        """
        if keys.shape[2] != places.shape[1]:
            raise DecodingUnsupported(f"layer {layer} does not keep the keys of all tokens")
        if layer not in self._tensors:
            self._tensors[layer] = self._empty(keys), self._empty(values)
        for whole, part in zip(self._tensors[layer], (keys, values), strict=True):
            whole[rows, :, places] = part.transpose(1, 2)

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


class Prompts(Cache):  # type: ignore[misc]
    """What a pass over prompts takes for its cache: keys and values go to `cache`, and tokens see those of the pass."""

    def __init__(self, cache: FixedCache, rows: torch.Tensor, places: torch.Tensor) -> None:
        super().__init__(layers=[])
        self._cache, self._rows, self._places = cache, rows, places

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._cache.fill(layer_idx, key_states, value_states, self._rows, self._places)
        return key_states, value_states


def refuse_other_layers(config: Any) -> None:
    """Raise DecodingUnsupported when a layer of the model of `config` keeps anything but the keys of all tokens."""
    for index, layer in enumerate(DynamicCache(config=config.get_text_config()).layers):
        if type(layer) is not DynamicLayer:
            raise DecodingUnsupported(f"layer {index} does not keep the keys of all tokens")


def refuse_counted_positions(model: Any) -> None:
    """Raise DecodingUnsupported when `model` takes no positions, and counts them from the length of its cache."""
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "position_ids" in inspect.signature(core.forward).parameters:
        return
    kinds = {type(module) for module in core.modules()}
    if any("past_key_values_length" in inspect.signature(kind.forward).parameters for kind in kinds):
        raise DecodingUnsupported("it counts positions from the length of its cache, which is fixed")


@contextmanager
def serving(cache: FixedCache, config: Any, kernels: Any | None) -> Iterator[None]:
    """Have the model of `config` compute its attention over `cache` in this block.

    transformers keeps what is registered for good: afterwards it holds the cache no longer, which can be most of a GPU.
    """
    before = config._attn_implementation
    AttentionInterface.register(NAME, functools.partial(attention, cache, kernels))
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        AttentionInterface.register(NAME, _no_cache)


def _no_cache(*args: Any, **kwargs: Any) -> None:
    raise DecodingUnsupported("it is not decoded at present")


def attention(
    cache: FixedCache,
    kernels: Any | None,
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
    """Compute one token's attention over `cache`, as transformers asks for it (AttentionInterface).

    By the Triton `kernels`, where there are any and the mask is the cache's own. Else the query heads that share a key
    are computed as if they were tokens, so that keys are read once and never repeated.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise DecodingUnsupported("its attention has a soft cap, sinks or a position bias")
    if query.shape[2] != 1 or attention_mask is None or attention_mask.shape[-1] != key.shape[2]:
        raise DecodingUnsupported("its attention is not asked for one token over the whole cache")
    if sliding_window is not None and sliding_window < key.shape[2]:
        raise DecodingUnsupported(f"its attention sees {sliding_window} tokens alone")
    rows, heads, _, head_dim = query.shape
    query = query.to(key.dtype)
    if kernels and attention_mask.data_ptr() == cache.mask.data_ptr() and kernels.takes(query, key):
        scale = head_dim**-0.5 if scaling is None else scaling
        return kernels.attention(query, key, value, cache.starts, cache.cursor, scale), None
    grouped = query.view(rows, key.shape[1], heads // key.shape[1], head_dim)
    mask = attention_mask.to(key.dtype)
    found = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
    return found.reshape(rows, 1, heads, value.shape[3]), None
