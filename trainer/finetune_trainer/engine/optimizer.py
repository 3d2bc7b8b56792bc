"""bitsandbytes' optimizers without their waits for the GPU, and with one launch where they have one for each matrix."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import torch

#: Paging moves an optimizer's state to host memory in need; a state this small (bytes) is not worth it.
_SMALL: Final = 256 << 20
#: Bytes of state for each trained weight, and the same algorithm without paging.
_UNPAGED: Final = {"paged_adamw_8bit": (2, "adamw_8bit")}
#: Weights that share a scale of their 8-bit state (Dettmers et al. 2022, arXiv:2110.02861), and that state.
_BLOCK: Final = 256
_STATE: Final = ("state1", "state2", "absmax1", "absmax2")


def unpaged(name: str, trained: int) -> str:
    """What to use in the place of the optimizer `name` for so many `trained` weights: the same updates. Paged state
    ends every step with a wait for the GPU."""
    each, other = _UNPAGED.get(name, (0, name))
    return other if trained * each <= _SMALL else name


def hasten(optimizer: Any) -> None:
    """Let an optimizer of bitsandbytes update all matrices at once, and not wait for the GPU after each of them (0.50,
    Optimizer8bit.step), which only paged state may need: all else is in order on the stream. The updates and what is
    saved of it are the same; paged and other optimizers are left alone."""
    with suppress(ImportError):
        from bitsandbytes.optim.optimizer import Optimizer8bit

        if isinstance(optimizer, Optimizer8bit) and not optimizer.is_paged:
            kind = type(optimizer)
            optimizer.__class__ = type(kind.__name__, (_AtOnce, kind), {})
            optimizer.joined = {}


@dataclass
class _Joined:
    """Matrices that follow one another in memory, as do the parts of their state."""

    members: list[torch.Tensor]
    weights: torch.Tensor
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, members: list[torch.Tensor], states: list[dict[str, Any]]) -> "_Joined":
        weights, places = _joined([each.data for each in members])
        for member, place in zip(members, places, strict=True):
            member.data = place
        state = {}
        for key in _STATE:
            state[key], places = _joined([each[key] for each in states])
            for each, place in zip(states, places, strict=True):
                each[key] = place
        return cls(members, weights, state)

    def holds(self, members: list[torch.Tensor]) -> bool:
        """Whether it is of just these `members`, and their weights still lie where they were put."""
        places = self.weights.data_ptr() + 4 * torch.tensor([0, *(each.numel() for each in members)]).cumsum(0)
        return len(self.members) == len(members) and all(
            mine is each and each.data_ptr() == place
            for mine, each, place in zip(self.members, members, places.tolist(), strict=False)
        )


def _joined(parts: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One vector of all `parts`, and each of them as its place there."""
    vector = torch.cat([part.flatten() for part in parts])
    places = vector.split([part.numel() for part in parts])
    return vector, [place.view(part.shape) for place, part in zip(places, parts, strict=True)]


class _AtOnce:
    """What an optimizer of bitsandbytes becomes. The first update of a matrix, which makes its state, is its own."""

    joined: dict[int, _Joined]

    def step(self, closure: Any = None) -> Any:
        from bitsandbytes.optim import optimizer as module

        wait, module.sync_gpu = module.sync_gpu, lambda tensor: None
        done: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for index, group in enumerate(self.param_groups):  # type: ignore[attr-defined]
                done += self._update_at_once(index, group)
            for parameter, _ in done:
                parameter.grad = None
            return super().step(closure)  # type: ignore[misc]
        finally:
            module.sync_gpu = wait
            for parameter, gradient in done:
                parameter.grad = gradient

    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.joined.clear()
        super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    @torch.no_grad()
    def _update_at_once(self, index: int, group: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Update those of a `group` that can be; returns them and their gradients."""
        state = self.state  # type: ignore[attr-defined]
        members = [each for each in group["params"] if each.grad is not None and _is_joinable(each, state.get(each))]
        states = [state[each] for each in members]
        if len({each["step"] for each in states}) != 1:
            return []
        if index not in self.joined or not self.joined[index].holds(members):
            self.joined[index] = _Joined.of(members, states)
        joined = self.joined[index]
        joined.weights.grad = torch.cat([each.grad.flatten() for each in members])
        state[joined.weights] = states[0] | joined.state
        try:
            self.update_step(group, joined.weights, index, 0)  # type: ignore[attr-defined]
        finally:
            del state[joined.weights]
            joined.weights.grad = None
        for each in states:
            each["step"] += 1
        return [(each, each.grad) for each in members]


def _is_joinable(parameter: torch.Tensor, state: dict[str, Any] | None) -> bool:
    """Whether it has 8-bit state, of whole blocks: else a scale would be shared with another matrix."""
    has_state = state is not None and all(key in state for key in _STATE)
    return has_state and parameter.dtype == torch.float32 and parameter.numel() % _BLOCK == 0
