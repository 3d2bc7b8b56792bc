"""One pass over the micro-batches of several trials: base products, attention and head are shared, each loss is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.data.batching import filled_up_batch
from finetune_trainer.engine.loss import Owners
from finetune_trainer.engine.packed_lora import PackedAdapters, Tokens
from finetune_trainer.planning.shapes import filled_up


@dataclass(frozen=True)
class Share:
    """One trial's part of a pass.

    Attributes:
        place: Its place.
        batch: Its micro-batch, as data.batching.Collate makes it, on the model's device.
        slope: What the loss, summed over its targets, is multiplied by: 1 / the targets of its step.
        seed: Of its dropout masks, an int32.
    """

    place: int
    batch: Mapping[str, Any]
    slope: torch.Tensor
    seed: int = 0


class PackedModel(torch.nn.Module):
    """A base model with the adapters of all places. It is to engine.compilation what a PEFT model is."""

    def __init__(self, core: Any, adapters: PackedAdapters) -> None:
        super().__init__()
        self.core, self.adapters = core, adapters
        #: Of each place, its share of its trial's loss in the latest pass. Graphs write where it lies.
        self.losses = torch.zeros(adapters.places, device=core.device)
        self._ends = torch.zeros(adapters.places, dtype=torch.int32, device=core.device)  # of the latest pass

    @property
    def device(self) -> torch.device:
        device: torch.device = self.core.device
        return device

    def get_base_model(self) -> Any:
        return self.core

    def forward(
        self,
        slopes: torch.Tensor,
        owners: torch.Tensor,
        *,
        ends: torch.Tensor,
        place: torch.Tensor,
        number: torch.Tensor,
        seeds: torch.Tensor,
        **inputs: Any,
    ) -> torch.Tensor:
        """Return the sum of all trials' losses: a trial's gradient is that of its own alone.

        The adapters' weights are those that were loaded last.

        Args:
            slopes: Of each place, as of its Share; 0 where there is none.
            owners: The place that each target counts to, int64 [targets]; the number of places where it only fills up.
            ends: As of Tokens, and so are the next three.
            place: Likewise.
            number: Likewise.
            seeds: Likewise.
            **inputs: As the core takes them.
        """
        self._ends = ends
        self.adapters.begin(Tokens(ends, place, number, seeds))
        found: torch.Tensor = self.core(**inputs, target_owners=Owners(owners, self.adapters.places)) * slopes
        self.losses.copy_(found.detach())
        return found.sum()

    def relevant(self, stacks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return of `stacks`, or of their gradients, the places that had tokens in the latest pass.

        A pass leaves anything at all as the gradient of a place without tokens.
        """
        had_tokens = self._ends.diff(prepend=self._ends.new_zeros(1)) > 0
        return [each[had_tokens] for each in stacks]


def joined(shares: Sequence[Share], places: int, rows: int, few_shapes: bool = False) -> dict[str, Any]:
    """Return what PackedModel takes for `shares`, in the order of their places.

    Args:
        shares: The trials' parts.
        places: Of the model.
        rows: The most rows of any part: shapes stay the same where fewer trials than places are left.
        few_shapes: Whether packed rows, and targets, are filled up to one of a few numbers, as data.batching.Collate
            does it. What fills up belongs to the last place, and nobody learns from it.
    """
    packed = "cu_seq_lens_q" in shares[0].batch
    # One more than rows, which may fill up.
    inputs, sizes, numbers = _end_to_end(shares, places * rows + 1) if packed else _side_by_side(shares)
    device, total = numbers.device, sum(sizes)
    size_at, seed_at = dict(zip((each.place for each in shares), sizes, strict=True)), [0] * places
    slopes = torch.zeros(places, device=device)
    for each in shares:
        seed_at[each.place] = each.seed
        slopes[each.place] = each.slope
    found = inputs | {
        "target_ids": torch.cat([each.batch["target_ids"] for each in shares]),
        "owners": torch.cat(
            [torch.full((len(each.batch["target_ids"]),), each.place, device=device) for each in shares]
        ),
    }
    of_places = [torch.full((size_at[each.place],), each.place, device=device) for each in shares]
    if few_shapes and packed:
        padding = filled_up(total) - total
        # The last sequence is empty, and makes room for what fills up.
        found |= filled_up_batch(found | {"cu_seq_lens_q": found["cu_seq_lens_q"][:-1]}, total, 0)
        more = len(found["target_ids"]) - len(found["owners"])
        found["owners"] = torch.nn.functional.pad(found["owners"], (0, more), value=places)
        size_at[places - 1] = size_at.get(places - 1, 0) + padding
        of_places.append(torch.full((padding,), places - 1, device=device))
        numbers = torch.cat([numbers, torch.arange(padding, dtype=torch.int32, device=device)])
    ends = torch.tensor([size_at.get(place, 0) for place in range(places)], dtype=torch.int32).cumsum(0)
    tokens = Tokens(
        ends=ends.to(torch.int32),
        place=torch.cat(of_places),
        number=numbers,
        seeds=torch.tensor(seed_at, dtype=torch.int32),
    )
    return {**found, **vars(tokens.to(device)), "slopes": slopes}


def _end_to_end(shares: Sequence[Share], rows: int) -> tuple[dict[str, Any], list[int], torch.Tensor]:
    """Return the inputs of packed micro-batches, the tokens of each, and the number of each token in its own."""
    batches = [each.batch for each in shares]
    sizes = [each["input_ids"].shape[1] for each in batches]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    ends = [each["cu_seq_lens_q"][1:] + start for each, start in zip(batches, starts, strict=True)]
    missing = rows - sum(map(len, ends))  # empty sequences, which kernels skip
    filler = ends[0].new_full((max(0, missing),), sum(sizes))
    sequences = torch.cat([ends[0].new_zeros(1), *ends, filler])
    longest = max(each["max_length_q"] for each in batches)
    inputs = {
        **{name: torch.cat([each[name] for each in batches], 1) for name in ("input_ids", "position_ids")},
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), sequences),
        **dict.fromkeys(("max_length_q", "max_length_k"), longest),
        "target_positions": torch.cat(
            [each["target_positions"] + start for each, start in zip(batches, starts, strict=True)]
        ),
    }
    device = sequences.device
    return inputs, sizes, torch.cat([torch.arange(size, dtype=torch.int32, device=device) for size in sizes])


def _side_by_side(shares: Sequence[Share]) -> tuple[dict[str, Any], list[int], torch.Tensor]:
    """Return the same of padded micro-batches: all rows become as wide as the widest."""
    batches = [each.batch for each in shares]
    shapes = [tuple(each["input_ids"].shape) for each in batches]
    width = max(each for _, each in shapes)
    positions, numbers, first = [], [], 0
    for batch, (rows, own) in zip(batches, shapes, strict=True):
        row, column = batch["target_positions"] // own, batch["target_positions"] % own
        positions.append((first + row) * width + column)
        number = torch.arange(rows * own, dtype=torch.int32, device=batch["input_ids"].device).view(rows, own)
        numbers.append(_widened(number, width).flatten())
        first += rows
    inputs = {
        **{
            name: torch.cat([_widened(each[name], width) for each in batches])
            for name in ("input_ids", "attention_mask")
        },
        "target_positions": torch.cat(positions),
    }
    return inputs, [rows * width for rows, _ in shapes], torch.cat(numbers)


def _widened(rows: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))
