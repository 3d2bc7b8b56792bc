"""The prompts of a batch, computed into a FixedCache: as many tokens a pass as memory for activations allows."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from finetune_trainer.data.batching import Collate
from finetune_trainer.data.encoding import IGNORE
from finetune_trainer.evaluation.fixed_cache import FixedCache, Prompts
from finetune_trainer.model.architecture import FOR_SEQUENCES
from finetune_trainer.runtime.transfer import on_device

#: Prompt tokens of one forward pass; it bounds the activations.
_TOKENS: Final = 16_384


@dataclass(frozen=True)
class _Pass:
    """One forward pass.

    Attributes:
        inputs: The model's arguments.
        rows: The prompt of each token, counted within the pass [rows of the input, tokens or 1].
        places: Where each token is in its prompt, negative for padding [rows of the input, tokens].
        last: Where prompts end in a row of the input.
    """

    inputs: dict[str, Any]
    rows: torch.Tensor
    places: torch.Tensor
    last: torch.Tensor


def prefill(model: Any, prompts: Sequence[Sequence[int]], cache: FixedCache, pad: int, packed: bool) -> torch.Tensor:
    """Compute keys and values of `prompts` into `cache`, and return the first token of each answer [rows].

    Args:
        model: The PEFT model.
        prompts: Token ids.
        cache: Has a row for each, and the places of their tokens.
        pad: The token before shorter prompts, where they are padded.
        packed: Whether the model takes rows laid end to end, as it is found to when it is loaded. Then no padding is
            computed and no mask is read.
    """
    first = torch.empty(len(prompts), dtype=torch.int64, device=model.device)
    packed = packed and model.config.get_text_config()._attn_implementation in FOR_SEQUENCES
    for numbers in _passes([len(each) for each in prompts], packed):
        layout = _end_to_end if packed else _side_by_side
        part = layout([prompts[number] for number in numbers], pad, model.device)
        mine = torch.tensor(numbers, device=model.device)
        rows = mine[part.rows]
        logits = model(
            **part.inputs,
            past_key_values=Prompts(cache, rows, cache.starts[rows] + part.places),
            use_cache=True,
            logits_to_keep=part.last,
        ).logits
        if logits.shape[1] != len(part.last):  # some models compute all of them
            logits = logits[:, part.last]
        first[mine] = logits.argmax(-1).flatten()
    return first


def _passes(lengths: Sequence[int], packed: bool) -> Iterator[list[int]]:
    """Yield the rows of each pass, longest first.

    So the shortest, whose answer is checked, comes after others, whose tokens it must not see.
    """
    rows: list[int] = []
    taken = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], -row)):
        width = lengths[row] if packed or not rows else lengths[rows[0]]
        if rows and taken + width > _TOKENS:
            yield rows
            rows, taken, width = [], 0, lengths[row]
        rows.append(row)
        taken += width
    yield rows


def _end_to_end(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> _Pass:
    batch = Collate(packed=True, pad_id=pad)([(list(each), [IGNORE] * len(each)) for each in prompts])
    rows = torch.arange(len(prompts)).repeat_interleave(torch.tensor([len(each) for each in prompts]))
    batch |= {"rows": rows[None], "last": batch["cu_seq_lens_q"][1:].long() - 1}
    inputs = on_device({name: batch[name] for name in batch if not name.startswith("target_")}, device)
    return _Pass(rows=inputs.pop("rows"), places=inputs["position_ids"], last=inputs.pop("last"), inputs=inputs)


def _side_by_side(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> _Pass:
    ids, real = left_padded(prompts, pad, device)
    width = ids.shape[1]
    padding = width - real.sum(-1, keepdim=True)
    places = torch.arange(width, device=device) - padding
    return _Pass(
        inputs={"input_ids": ids, "attention_mask": real, "position_ids": places.clamp(min=0)},
        rows=torch.arange(len(prompts), device=device)[:, None],
        places=places,
        last=torch.tensor([width - 1], device=device),
    )


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids [rows, longest], padded on the left, and a mask of the same shape: 1 for a prompt's own."""
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(each)) + list(each) for each in prompts]
    real = [[0] * (width - len(each)) + [1] * len(each) for each in prompts]
    return torch.tensor(ids, device=device), torch.tensor(real, device=device)
