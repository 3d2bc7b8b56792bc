"""How a mixture of experts routes tokens, by its config.json. Pure, importable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_CHOSEN: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")


@dataclass(frozen=True)
class Routing:
    """A mixture of experts in numbers.

    Attributes:
        experts: How many there are in a layer.
        chosen: How many of them compute each token.
        width: The inner width of each.
        shared: The inner width of what computes every token beside them.
    """

    experts: int
    chosen: int
    width: int
    shared: int = 0

    @classmethod
    def from_config(cls, text: Mapping[str, Any]) -> "Routing | None":
        """Read the settings of a language model; None for one without experts. Raises KeyError, TypeError."""
        experts = _number(text, _EXPERTS)
        if not experts:
            return None
        width = int(text.get("moe_intermediate_size") or text["intermediate_size"])
        shared = int(text.get("n_shared_experts") or 0) * width
        return cls(
            experts=experts,
            chosen=min(experts, _number(text, _CHOSEN) or 1),
            width=width,
            shared=int(text.get("shared_expert_intermediate_size") or shared),
        )

    @property
    def active_width(self) -> int:
        """The inner width that computes a token."""
        return self.chosen * self.width + self.shared


def _number(text: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the first setting that is there; some types list one for each layer."""
    found = next((text[name] for name in names if text.get(name)), 0)
    return max(map(int, found)) if isinstance(found, list | tuple) else int(found)
