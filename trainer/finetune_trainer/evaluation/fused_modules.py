"""What is many small kernels in few, while a GPU evaluates: a decoded token is thousands of them otherwise.

Nothing here goes by the name of a model. What a kernel computes is compared with the model's own code first, on random
numbers of the types and strides that are asked for; where that differs, or asks for more, the model's own code stays.
"""

import importlib
import inspect
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, Final

import structlog
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.functional import linear

from finetune_trainer.errors import type_and_reason
from finetune_trainer.planning.memory import SAME_INPUT

log = structlog.get_logger(__name__)
_ADAPTER: Final = "default"
#: What two roundings of one number in half precision may differ by.
_ROUNDING: Final = 2**-7
#: What models of transformers call to turn queries and keys by their positions; it lies beside their attention.
_ROTARY: Final = "apply_rotary_pos_emb"
#: Rows and tokens of random numbers.
_ROWS: Final = 2
_TOKENS: Final = 5
#: What was found to compute alike, by all that this depends on: it is asked once in a process.
_alike: dict[Hashable, bool] = {}


def kernels(device: torch.device) -> Any | None:
    """Return the module of Triton kernels, None where there are none."""
    if device.type != "cuda":
        return None
    try:
        return importlib.import_module("finetune_trainer.evaluation.decode_kernels")
    except Exception as error:
        log.warning(f"Answers are generated without Triton kernels, which is slower: {type_and_reason(error)}")
        return None


@contextmanager
def fused(model: Any) -> Iterator[None]:
    """Compute adapters, norms, gated products and rotary embeddings of `model` in few kernels in this block.

    An adapter is rounded once, when it is added, its weights are cast once for all tokens, and adapters with the same
    input read it once. Without Triton kernels nothing changes, and afterwards everything is as before: layers that are
    compiled later must not find ours.
    """
    triton = kernels(model.device)
    if triton is None:
        yield
        return
    before: list[tuple[dict[str, Any], str, Any]] = []

    def replace(names: dict[str, Any], name: str, value: Any) -> None:
        before.append((names, name, names.get(name)))
        names[name] = value

    try:
        for names in _calling_rotary(model):
            replace(names, _ROTARY, _rotary(names[_ROTARY], triton))
        for module in model.modules():
            for adapter, forward in _adapter_forwards(module, model.device.type):
                replace(adapter.__dict__, "forward", forward)
            if _is_norm(module, triton.rms_norm):
                replace(module.__dict__, "forward", _norm_forward(module, triton.rms_norm))
            elif _is_gated(module, triton.silu_product):
                replace(module.__dict__, "forward", _gated_forward(module, triton.silu_product))
        yield
    finally:
        for names, name, value in reversed(before):
            if value is None:
                del names[name]
            else:
                names[name] = value


def _computes_alike(kind: Hashable, what: str, compare: Callable[[], bool]) -> bool:
    """Return whether `compare` found the same numbers; once for each `kind`, unless memory was full."""
    if kind not in _alike:
        reason = "ours gives other numbers"
        try:
            _alike[kind] = compare()
        except torch.OutOfMemoryError:
            return False
        except Exception as error:
            _alike[kind], reason = False, type_and_reason(error)
        if not _alike[kind]:
            log.info(f"Evaluations compute {what} by the model's own kernels: {reason}")
    return _alike[kind]


def _is_plain_adapter(module: Any) -> bool:
    return (
        isinstance(module, LoraLayer)
        and not isinstance(module, ParamWrapper)
        and not module.disable_adapters
        and not module.merged
        and module.active_adapters == [_ADAPTER]
        and _ADAPTER not in module.lora_variant
        and isinstance(dict(module.lora_A).get(_ADAPTER), torch.nn.Linear)
        and module.lora_B[_ADAPTER].bias is None
    )


def _adapter_forwards(parent: Any, device: str) -> Iterator[tuple[Any, Callable[..., torch.Tensor]]]:
    """Yield the adapters right below `parent`, each with what computes it."""
    left = {name: child for name, child in parent.named_children() if _is_plain_adapter(child)}
    while left:
        first = next(iter(left))
        names = next((names for names in SAME_INPUT if first in names), (first,))
        members = [left.pop(name) for name in names if name in left]
        shared = _SharedInput([member.lora_A[_ADAPTER].weight for member in members], device)
        for index, member in enumerate(members):
            yield member, _adapter_forward(member, shared, index)


class _SharedInput:
    """Products of one input with the first matrices of several adapters, computed when the first of them asks."""

    def __init__(self, matrices: list[torch.Tensor], device: str) -> None:
        autocast = torch.is_autocast_enabled(device)
        self.dtype = torch.get_autocast_dtype(device) if autocast else matrices[0].dtype
        self._matrices = torch.cat([each.to(self.dtype) for each in matrices])
        self._ranks = [len(each) for each in matrices]
        self._x: torch.Tensor | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if x is not self._x or index not in self._waiting:
            found = linear(x.to(self.dtype), self._matrices).flatten(0, -2)
            self._x, self._waiting = x, dict(enumerate(found.split(self._ranks, -1)))
        mine = self._waiting.pop(index)
        if not self._waiting:
            self._x = None
        return mine


def _adapter_forward(module: Any, shared: _SharedInput, index: int) -> Callable[..., torch.Tensor]:
    b, scaling, plain = module.lora_B[_ADAPTER].weight.to(shared.dtype).t(), module.scaling[_ADAPTER], module.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        base = module.base_layer(x, *args, **kwargs)
        if base.dtype != shared.dtype or kwargs:
            return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        # In place: addmm would copy what it adds to first, and nobody else has it.
        return base.flatten(0, -2).addmm_(shared(x, index), b, alpha=scaling).view_as(base)  # type: ignore[no-any-return]

    return forward


def _is_norm(module: Any, fast: Callable[..., torch.Tensor]) -> bool:
    """Return whether `module` is a norm that `fast` computes."""
    weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.dim() != 1 or epsilon is None:
        return False

    def compare() -> bool:
        x = _random(weight.device)(16, len(weight)).to(weight.dtype)
        found, expected = fast(x, weight, epsilon), module(x)
        return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=_ROUNDING, atol=0)

    return _computes_alike((type(module), weight.dtype, fast), "norms", compare)


def _norm_forward(module: Any, fast: Callable[..., torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, epsilon = module.weight, module.variance_epsilon
    return lambda x: fast(x, weight, epsilon)


def _is_gated(module: Any, fast: Callable[..., torch.Tensor]) -> bool:
    """Return whether `module` is down_proj(silu(gate_proj(x)) * up_proj(x)).

    Its class's code is asked, with projections that only hand on numbers: whatever else is in it shows.
    """
    activation = getattr(module, "act_fn", None)
    if activation is None or not hasattr(module, "gate_proj") or "forward" in module.__dict__:
        return False

    def compare() -> bool:
        parts = SimpleNamespace(gate_proj=_first, up_proj=_second, down_proj=lambda x: x, act_fn=activation)
        numbers = _random(next(module.parameters()).device)(_ROWS, _TOKENS, 128) * 4
        for x in (numbers.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)):
            found, expected = fast(_first(x), _second(x)), type(module).forward(parts, x)
            if found.dtype != expected.dtype or not torch.allclose(found, expected, rtol=2 * _ROUNDING, atol=1e-6):
                return False
        return True

    kind = activation if inspect.isfunction(activation) else type(activation)
    return _computes_alike((type(module), kind, fast), "gated products", compare)


def _first(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(2, -1)[0]


def _second(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(2, -1)[1]


def _gated_forward(module: Any, fast: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        inputs = (*args, *kwargs.values())
        if len(inputs) != 1:
            return plain(*args, **kwargs)  # type: ignore[no-any-return]
        found: torch.Tensor = module.down_proj(fast(module.gate_proj(*inputs), module.up_proj(*inputs)))
        return found

    return forward


def _calling_rotary(model: Any) -> list[dict[str, Any]]:
    """Return the global names of the code of `model` that turns queries and keys."""
    kinds = {type(module) for module in model.modules()}
    found = [getattr(inspect.unwrap(kind.forward), "__globals__", {}) for kind in kinds]
    return list({id(names): names for names in found if _ROTARY in names}.values())


def _rotary(plain: Callable[..., Any], triton: Any) -> Callable[..., Any]:
    """Return what computes `plain` in one kernel, for arguments with which both give the same bits."""

    def rotate(*args: Any, **kwargs: Any) -> Any:
        tensors = not kwargs and len(args) == 4 and all(isinstance(each, torch.Tensor) for each in args)
        if not tensors or not triton.can_rotate(*args) or not _rotates_alike(plain, triton.rotary, *args):
            return plain(*args, **kwargs)
        return triton.rotary(*args)

    return rotate


def _rotates_alike(
    plain: Callable[..., Any],
    fast: Callable[..., Any],
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    *_: Any,
) -> bool:
    heads, key_heads, size = query.shape[1], key.shape[1], query.shape[3]
    turned, tokens = min(len(cos), _ROWS), min(query.shape[2], _TOKENS)

    def compare() -> bool:
        draw = _random(query.device)
        q, k = (draw(_ROWS, tokens, count, size).to(query.dtype).transpose(1, 2) for count in (heads, key_heads))
        angles = [draw(turned, tokens, size).to(cos.dtype) for _ in range(2)]
        pairs = list(zip(fast(q, k, *angles), plain(q, k, *angles), strict=True))
        return all(found.dtype == expected.dtype and torch.equal(found, expected) for found, expected in pairs)

    kind = (plain, fast, query.dtype, cos.dtype, heads, key_heads, size, turned, tokens)
    return _computes_alike(kind, "rotary embeddings", compare)


def _random(device: torch.device) -> Callable[..., torch.Tensor]:
    """Return what draws normal numbers, always the same ones, and not from the generator of the training."""
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device)
