"""bitsandbytes' optimizers without their waits for the GPU, and with one launch where they have one for each matrix."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import torch

from finetune_trainer.engine.flat import end_to_end, flattened
from finetune_trainer.runtime.patches import mix_into, without_gpu_sync

#: Paging moves an optimizer's state to host memory in need; a state this small (bytes) is not worth it.
_SMALL: Final = 256 << 20
#: Bytes of state for each trained weight, and the same algorithm without paging.
_UNPAGED: Final = {"paged_adamw_8bit": (2, "adamw_8bit")}
#: Weights that share a scale of their 8-bit state (Dettmers et al. 2022, arXiv:2110.02861), and that state.
_BLOCK: Final = 256
_STATE: Final = dict.fromkeys(("state1", "state2", "absmax1", "absmax2")).keys()
#: Weights of one launch: bitsandbytes counts them in 32 bits, and their gradients are copied.
_MOST_WEIGHTS: Final = 64 << 20


def unpaged(name: str, trained: int) -> str:
    """Use the non-paged optimizer when its state is small (same updates, no sync).

    Args:
        name: The optimizer that was asked for.
        trained: How many weights it trains.

    Returns:
        The optimizer to use. Paged state ends every step with a wait for the GPU.
    """
    each, other = _UNPAGED.get(name, (0, name))
    return other if trained * each <= _SMALL else name


def fuse_updates(optimizer: Any) -> None:
    """Let an optimizer of bitsandbytes update many matrices by one launch, without waiting for the GPU after each.

    Only paged state may need these waits (0.50, Optimizer8bit.step): all else is in order on the stream. The updates
    and the saved state are the same; paged and other optimizers are left alone. Settings for single matrices
    (GlobalOptimManager) have no effect.
    """
    with suppress(ImportError):
        from bitsandbytes.optim.optimizer import Optimizer8bit

        if isinstance(optimizer, Optimizer8bit) and not optimizer.is_paged:
            mix_into(optimizer, _FusedStep)
            optimizer.fused = {}


@dataclass
class _FlatParameters:
    """Matrices that follow one another in memory, as do the parts of their state."""

    members: list[torch.Tensor]
    weights: torch.Tensor
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, members: list[torch.Tensor], states: list[dict[str, Any]]) -> "_FlatParameters":
        weights, views = flattened([each.data for each in members])
        for member, view in zip(members, views, strict=True):
            member.data = view
        state = {}
        for key in _STATE:
            state[key], views = flattened([each[key] for each in states])
            for each, view in zip(states, views, strict=True):
                each[key] = view
        return cls(members, weights, state)

    def holds(self, members: list[torch.Tensor]) -> bool:
        """Return whether it consists of these `members`, and their weights are still where they were put."""
        views = self.weights.split([each.numel() for each in self.members])
        return len(self.members) == len(members) and all(
            mine is each and each.data_ptr() == view.data_ptr()
            for mine, each, view in zip(self.members, members, views, strict=True)
        )


class _FusedStep:
    """Mixed into an optimizer of bitsandbytes, which still does the first update of a matrix: that makes its state."""

    fused: dict[tuple[int, int], _FlatParameters]
    # Of the optimizer:
    param_groups: list[dict[str, Any]]
    state: dict[torch.Tensor, dict[str, Any]]
    update_step: Callable[..., None]

    def step(self, closure: Any = None) -> Any:
        with without_gpu_sync():
            return self._update_all(closure)

    def _update_all(self, closure: Any) -> Any:
        done: list[tuple[torch.Tensor, torch.Tensor]] = []
        before, self.fused = self.fused, {}
        try:
            for index, group in enumerate(self.param_groups):
                for number, members in enumerate(self._fusible(group)):
                    flat = before.get((index, number))
                    if flat is None or not flat.holds(members):
                        flat = _FlatParameters.of(members, [self.state[each] for each in members])
                    self.fused[index, number] = flat
                    done += self._update(flat, index, group)
            for parameter, _ in done:
                parameter.grad = None
            return super().step(closure)  # type: ignore[misc]
        finally:
            for parameter, gradient in done:
                parameter.grad = gradient

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.fused.clear()
        super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def _fusible(self, group: dict[str, Any]) -> list[list[torch.Tensor]]:
        """Return the matrices of `group` to update together.

        They have 8-bit state of whole blocks (else a scale would be shared with another matrix), and the same number of
        steps behind them.
        """
        runs: list[list[torch.Tensor]] = []
        size, steps = 0, None
        for each in group["params"]:
            state = self.state.get(each, {})
            whole = each.dtype == torch.float32 and each.numel() % _BLOCK == 0
            if each.grad is None or not whole or not state.keys() >= _STATE:
                continue
            if not runs or state["step"] != steps or size + each.numel() > _MOST_WEIGHTS:
                runs.append([])
                size, steps = 0, state["step"]
            runs[-1].append(each)
            size += each.numel()
        return runs

    @torch.no_grad()
    def _update(self, flat: _FlatParameters, index: int, group: dict[str, Any]) -> list[tuple[Any, Any]]:
        """Update the members of `flat`, of the group `index`, by one launch; returns them and their gradients."""
        state = self.state
        gradients = [each.grad for each in flat.members if each.grad is not None]
        flat.weights.grad = end_to_end(gradients)
        state[flat.weights] = state[flat.members[0]] | flat.state
        try:
            self.update_step(group, flat.weights, index, 0)
        finally:
            del state[flat.weights]
            flat.weights.grad = None
        for each in flat.members:
            state[each]["step"] += 1
        return list(zip(flat.members, gradients, strict=True))
