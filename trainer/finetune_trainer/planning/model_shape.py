"""A model in the numbers that memory and speed follow from. Pure, importable without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from finetune_trainer.planning.parameters import Counts, count, first, is_tied
from finetune_trainer.planning.routing import Routing

#: What other families call the width of the MLP; four times the model's width where none is given.
_OTHER_WIDTHS = ("ffn_dim", "n_inner", "ffn_hidden_size")


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer in numbers (all counts, no units).

    Attributes:
        intermediate_size: The inner width that computes a token: of a mixture of experts that of the chosen ones.
        counts: The weights of the whole model, if they are known; else they are those of a model like Llama.
        trained: The weights of the adapter, if they are known.
        routing: How tokens go to experts; None where there are none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied_embeddings: bool = False
    counts: Counts | None = None
    trained: int | None = None
    routing: Routing | None = None

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], counts: Counts | None = None, trained: int | None = None
    ) -> "ModelShape | None":
        """Read config.json; None for an architecture that these numbers do not describe.

        Args:
            config: The configuration.
            counts: The model's weights, where it was built to count them; else a table is asked.
            trained: The adapter's weights, likewise.
        """
        text = config.get("text_config") or config
        counts = counts or count(config)
        try:
            routing = Routing.from_config(text)
            if routing and counts is None:
                return None
            hidden = first(text, "hidden_size", "n_embd", "d_model")
            heads = first(text, "num_attention_heads", "n_head", "n_heads")
            widths = {**text, "four_times": 4 * hidden if counts else 0}
            inner = 0 if routing else first(widths, "intermediate_size", *_OTHER_WIDTHS, "four_times")
            return cls(
                vocab_size=int(text["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=routing.active_width if routing else inner,
                layers=first(text, "num_hidden_layers", "n_layer", "n_layers"),
                heads=heads,
                kv_heads=int(text.get("num_key_value_heads") or heads),
                head_dim=int(text.get("head_dim") or hidden // heads),
                tied_embeddings=is_tied(config),
                counts=counts,
                trained=trained,
                routing=routing,
            )
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """The (input, output) widths of each linear layer of one decoder layer."""
        hidden, queries, keys = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
            "gate_proj": (hidden, self.intermediate_size),
            "up_proj": (hidden, self.intermediate_size),
            "down_proj": (self.intermediate_size, hidden),
        }

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers, the head not counted."""
        if self.counts:
            return self.counts.linear
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_shapes.values())

    @property
    def expert_weights(self) -> int:
        """Weights of experts, which are quantized to 4 bits alone."""
        return self.counts.experts if self.counts else 0

    @property
    def active_weights(self) -> float:
        """Weights that compute each token."""
        share = self.routing.chosen / self.routing.experts if self.routing else 0.0
        return self.linear_weights + self.expert_weights * share

    @property
    def routed_size(self) -> int:
        """The width of a token at the experts' door, once for each that computes it; 0 where there are none."""
        return self.routing.chosen * self.hidden_size if self.routing and self.expert_weights else 0

    @property
    def other_weights(self) -> int:
        """Weights of embeddings, head and norms."""
        if self.counts:
            return self.counts.other
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return embeddings + (2 * self.layers + 1) * self.hidden_size
