"""Variable-length flash attention as an attention implementation of transformers, called `varlen`.

Rows are packed end to end without their padding, so that no mask is built and no padding is computed. It needs no
package but torch, and a GPU that runs flash attention (compute capability 8), in half precision: the kernel is torch's
own, and on Hopper ours, which is made for short rows (kernels/attention.py).
"""

import importlib
import inspect
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, Final

import structlog
import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flash_attention_mask

from finetune_trainer.engine.sequences import SequenceLayout, layout_from_mask, layout_from_positions
from finetune_trainer.errors import type_and_reason
from finetune_trainer.model.architecture import head_dim

log = structlog.get_logger(__name__)
NAME: Final = "varlen"
#: The kernel's limits (torch.nn.attention.varlen, flash attention 2).
MAX_HEAD_DIM: Final = 256
HEAD_DIM_MULTIPLE: Final = 8
MIN_COMPUTE_CAPABILITY: Final = (8, 0)
#: Our kernels were measured to be faster on Hopper; those of attention, with these head sizes.
HOPPER: Final = (9, 0)
_OUR_HEAD_DIMS: Final = (64, 128)
#: What two half-precision attentions may differ by, as a part of the largest value.
TOLERANCE: Final = 2e-2
#: Layouts by the tensor that they are read from, the same one in all layers: reading it waits for the GPU.
_known: MutableMapping[torch.Tensor, SequenceLayout] = WeakTensorKeyDictionary()
#: Whether our kernels are used; `self_check` sets it.
_ours = False


def forward(
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
    """Compute attention as transformers asks for it (AttentionInterface).

    Args:
        module: The attention layer.
        query: [rows, heads, tokens, head_dim]; key and value may have fewer heads.
        key: Likewise.
        value: Likewise.
        attention_mask: [rows, tokens] or None, as `flash_attention_mask` makes it.
        scaling: What products are multiplied by.
        dropout: Must be 0.
        sliding_window: How many tokens back a token sees; None for all.
        **kwargs: Of these, position_ids and cu_seq_lens_q say where sequences begin.

    Returns:
        The output [rows, tokens, heads, head_dim], and None for the attention weights.

    Raises:
        ValueError: For what the kernel cannot compute.
    """
    if dropout or any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise ValueError("varlen attention has no dropout, soft cap, sinks or position bias; take sdpa or eager")
    if query.shape[2] != key.shape[2]:
        mask = _mask(query.shape[2], key.shape[2], attention_mask, sliding_window, query.device)
        cached: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
        return cached
    rows, heads, width, head_dim = query.shape
    layout = _layout(query, attention_mask, kwargs)
    flat = [_half(each, value).transpose(1, 2).flatten(0, 1) for each in (query, key, value)]
    if layout.kept is not None:
        flat = [each.index_select(0, layout.kept) for each in flat]
    found = _kernel(flat[0], flat[1], flat[2], layout, scaling, sliding_window)
    if layout.kept is not None:
        found = found.new_zeros(rows * width, heads, head_dim).index_copy(0, layout.kept, found)
    return found.view(rows, width, heads, head_dim), None


def _layout(query: torch.Tensor, mask: torch.Tensor | None, kwargs: dict[str, Any]) -> SequenceLayout:
    positions = kwargs.get("position_ids")
    if mask is not None:
        return _once(mask, layout_from_mask)
    if kwargs.get("cu_seq_lens_q") is not None:  # from the collator, which need not wait for the GPU
        return SequenceLayout(kwargs["cu_seq_lens_q"].to(query.device, torch.int32), int(kwargs["max_length_q"]))
    if positions is not None and positions.shape == (query.shape[0], query.shape[2]):
        return _once(positions, layout_from_positions)
    rows, width = query.shape[0], query.shape[2]
    return SequenceLayout(torch.arange(rows + 1, dtype=torch.int32, device=query.device) * width, width)


def _once(tensor: torch.Tensor, make: Callable[[torch.Tensor], SequenceLayout]) -> SequenceLayout:
    if tensor not in _known:
        _known[tensor] = make(tensor)
    return _known[tensor]


def _half(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in the half precision of the computation: norms and rotations may have made it float32."""
    if torch.is_autocast_enabled(tensor.device.type):
        return tensor.to(torch.get_autocast_dtype(tensor.device.type))
    return tensor.to(like.dtype)


def _kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: SequenceLayout,
    scaling: float | None,
    window: Any,
) -> torch.Tensor:
    """Compute causal attention within each sequence; tensors are [tokens, heads, head_dim]."""
    starts, longest = layout.starts, layout.longest
    if _ours and window is None and query.shape[-1] == value.shape[-1] and query.shape[-1] in _OUR_HEAD_DIMS:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        found: torch.Tensor = torch.ops.finetune.attention(query, key, value, starts, longest, scale)[0]
        return found
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": (window - 1 if window else -1, 0)}
    if query.shape[1] != key.shape[1] and _asks_for_groups(varlen_attn):
        options["enable_gqa"] = True
    return varlen_attn(query, key, value, starts, starts, longest, longest, **options)  # type: ignore[return-value]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _asks_for_groups(kernel: Callable[..., Any]) -> bool:
    """Return whether the kernel must be told of fewer key and value heads than query heads (since torch 2.12)."""
    return "enable_gqa" in inspect.signature(kernel).parameters


def _mask(
    queries: int, keys: int, padding: torch.Tensor | None, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Return SDPA's mask: which keys each of the last `queries` of `keys` tokens sees, in generation with a cache."""
    if padding is None and queries == 1 and not window:
        return None
    ages = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = (ages >= 0) & (ages < window) if window else ages >= 0
    return seen[None, None] if padding is None else seen & padding[:, None, None, :].bool()


def register() -> None:
    """Make `varlen` known to transformers."""
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, flash_attention_mask)


def unsupported_reason(config: Any) -> str | None:
    """Return why the model of `config` cannot be computed with it, None if it can."""
    text, size = config.get_text_config(), head_dim(config)
    if size > MAX_HEAD_DIM or size % HEAD_DIM_MULTIPLE:
        return f"takes head sizes up to {MAX_HEAD_DIM} in steps of {HEAD_DIM_MULTIPLE}, the model's is {size}"
    if getattr(text, "attention_dropout", 0):
        return "has no dropout, and the model's attention has"
    if getattr(text, "attn_logit_softcapping", None):
        return "has no soft cap, and the model's attention has"
    return None


def self_check(config: Any, device: str, dtype: torch.dtype, longest: int) -> str | None:
    """Compare a small forward and backward pass with SDPA on `device`, in the model's head sizes.

    Our kernels are checked where they are the faster ones, and torch's where ours do not pass. Those that pass are used
    from then on. Every error is caught: a missing kernel must not end a run.

    Args:
        config: The model's.
        device: Where it trains.
        dtype: In which attention is computed.
        longest: The most tokens of a row: long rows have tiles of their own, which are checked beside the others.

    Returns:
        What is wrong, None when the kernels agree with SDPA.
    """
    global _ours
    _ours = ours_are_faster(config, device)
    problem = _problem(config, device, dtype, longest)
    if problem and _ours:
        log.warning(f"Triton attention disabled, using torch varlen_attn: {problem}")
        _ours = False
        problem = _problem(config, device, dtype, longest)
    return problem


def _problem(config: Any, device: str, dtype: torch.dtype, longest: int) -> str | None:
    try:
        if _ours:
            importlib.import_module("finetune_trainer.engine.kernels.attention")
        worst = max(_difference(config, device, dtype, padded, longest) for padded in (False, True))
    except Exception as error:
        return f"fails here: {type_and_reason(error)}"
    return None if worst <= TOLERANCE else f"differs from SDPA by {worst:.1%} on this GPU"


def ours_are_faster(config: Any, device: str) -> bool:
    """Return whether our kernels are the faster ones for the model of `config` on `device`."""
    return (
        torch.device(device).type == "cuda"
        and torch.cuda.get_device_capability(device) == HOPPER
        and head_dim(config) in _OUR_HEAD_DIMS
        and not getattr(config.get_text_config(), "sliding_window", None)
    )


def heads(config: Any) -> tuple[int, int, int]:
    """Return the heads of queries, those of keys and values, and the size of each."""
    text = config.get_text_config()
    count = text.num_attention_heads
    return count, getattr(text, "num_key_value_heads", None) or count, head_dim(config)


def _difference(config: Any, device: str, dtype: torch.dtype, padded: bool, longest: int) -> float:
    """Return the largest difference of outputs and gradients, as a part of the largest value."""
    query_heads, kv_heads, size = heads(config)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(2, count, 200, size) for count in (query_heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator, device=device, dtype=dtype) for shape in shapes]
    real = torch.ones(2, 200, dtype=torch.bool, device=device)
    packed: dict[str, Any] = {}
    if padded:
        real[0, 137:] = False
    else:
        starts = torch.arange(0, 401, 200, dtype=torch.int32, device=device)
        packed = {"cu_seq_lens_q": starts, "max_length_q": max(200, longest)}
    ours = partial(forward, None, attention_mask=real if padded else None, **packed)
    results = []
    for function in (ours, partial(_plain, real=real)):
        leaves = [each.clone().requires_grad_() for each in inputs]
        output = function(*leaves, scaling=size**-0.5)[0] * real[:, :, None, None]
        output.float().square().sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    pairs = zip(*results, strict=True)
    return max(float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs)


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, real: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, None]:
    """Compute the same by SDPA, with a mask, in float32."""
    groups = query.shape[1] // key.shape[1]
    key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    mask = _mask(query.shape[2], key.shape[2], real, None, query.device)
    found = torch.nn.functional.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), attn_mask=mask, scale=scaling
    )
    return found.transpose(1, 2).to(query.dtype), None
