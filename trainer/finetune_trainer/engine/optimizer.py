"""bitsandbytes' optimizers without their waits for the GPU."""

from contextlib import suppress
from typing import Any, Final

#: Paging moves an optimizer's state to host memory in need; a state this small (bytes) is not worth it.
_SMALL: Final = 256 << 20
#: Bytes of state for each trained weight, and the same algorithm without paging.
_UNPAGED: Final = {"paged_adamw_8bit": (2, "adamw_8bit")}


def unpaged(name: str, trained: int) -> str:
    """What to use in the place of the optimizer `name` for so many `trained` weights: the same updates. Paged state
    ends every step with a wait for the GPU."""
    each, other = _UNPAGED.get(name, (0, name))
    return other if trained * each <= _SMALL else name


def do_not_wait(optimizer: Any) -> None:
    """Keep an optimizer of bitsandbytes from waiting for the GPU after each parameter (0.50, Optimizer8bit.step), which
    only paged state may need: all else is in order on the stream. Others are left alone."""
    with suppress(ImportError):
        from bitsandbytes.optim.optimizer import Optimizer8bit

        if isinstance(optimizer, Optimizer8bit) and not optimizer.is_paged:
            kind = type(optimizer)
            optimizer.__class__ = type(kind.__name__, (_WithoutWaiting, kind), {})


class _WithoutWaiting:
    def step(self, closure: Any = None) -> Any:
        from bitsandbytes.optim import optimizer as module

        wait, module.sync_gpu = module.sync_gpu, lambda tensor: None
        try:
            return super().step(closure)  # type: ignore[misc]
        finally:
            module.sync_gpu = wait
