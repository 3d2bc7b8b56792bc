"""The loss that a model's forward pass answers with: of its head, fused, or of its own logits where those differ."""

import functools
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from finetune_trainer.engine.loss import Logits, Owners, plain_cross_entropy, summed_cross_entropy
from finetune_trainer.model.architecture import FOR_SEQUENCES
from finetune_trainer.runtime.patches import packed_sequences_known, restore_forward, swap_forward


@dataclass
class FusedLoss:
    """Settings of a model's loss, which may change while it trains.

    Attributes:
        logits: What the model does to its head's product.
        compiled: Whether the tiles are computed by torch.compile.
        own: Whether the loss is that of the model's own logits, all of them at one time.
    """

    logits: Logits
    compiled: bool = False
    own: bool = False


def patch_fused_loss(core: Any) -> None:
    """Patch `core.forward` to return the summed loss when `target_positions` and `target_ids` are passed.

    With `target_owners` it returns the loss of each owner.

    `core` is a causal language model of transformers; without targets it answers as ever. Its forward pass is patched,
    and not called around, so that wrappers (PEFT, autocast, FSDP) hold. Settings are at `core.fused_loss`; a model that
    has them keeps them.
    """
    if hasattr(core, "fused_loss"):
        return
    restore_forward(core)
    plain, core.fused_loss = core.forward, FusedLoss(Logits.of(core.config))

    @functools.wraps(type(core).forward)  # generation looks at the signature
    def forward(
        self: Any,
        *args: Any,
        target_positions: torch.Tensor | None = None,
        target_ids: torch.Tensor | None = None,
        target_weights: torch.Tensor | None = None,
        target_owners: Owners | None = None,
        **kwargs: Any,
    ) -> Any:
        if target_positions is None or target_ids is None:
            return plain(*args, **kwargs)
        kwargs.pop("labels", None)
        settings = self.fused_loss
        with _sequences(self, kwargs):
            if settings.own:
                logits = plain(*args, **{**kwargs, "use_cache": False}).logits
                chosen = logits.flatten(0, 1).index_select(0, target_positions)
                return plain_cross_entropy(chosen, target_ids, target_weights, target_owners)
            hidden = _body(self)(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        head = self.get_output_embeddings()
        return summed_cross_entropy(
            hidden,
            head,
            target_positions,
            target_ids,
            settings.logits,
            settings.compiled,
            target_weights,
            target_owners,
        )

    swap_forward(core, MethodType(forward, core))


def target_logits(core: Any, batch: dict[str, Any], own: bool) -> torch.Tensor:
    """Return the logits [targets, vocabulary] in float32 that the loss of `batch` is made of.

    Args:
        core: A model with a patched loss.
        batch: A micro-batch.
        own: Whether the model itself computes them, or its head's product is taken.
    """
    inputs = {name: each for name, each in batch.items() if name not in ("target_positions", "target_ids")}
    positions = batch["target_positions"]
    with _sequences(core, inputs):
        if own:
            found: torch.Tensor = core(**inputs, use_cache=False).logits
            return found.flatten(0, 1).index_select(0, positions).float()
        hidden = _body(core)(**inputs, use_cache=False).last_hidden_state
    head = core.get_output_embeddings()
    chosen = hidden.flatten(0, 1).index_select(0, positions).to(head.weight.dtype)
    return core.fused_loss.logits.of_product(head(chosen))  # type: ignore[no-any-return]


def _body(core: Any) -> Any:
    """Return what makes hidden states of tokens: of a multimodal model its language model, for there are no images."""
    is_language_model = core.config.get_text_config(decoder=True) is core.config
    return core.base_model if is_language_model else core.get_decoder()


def _sequences(core: Any, inputs: dict[str, Any]) -> Any:
    """Keep transformers from making a mask where the collator says where sequences begin."""
    known = "cu_seq_lens_q" in inputs and core.config._attn_implementation in FOR_SEQUENCES
    return packed_sequences_known() if known else nullcontext()
