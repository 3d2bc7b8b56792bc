"""Which rows make a step, how they are partitioned over processes and micro-batches, and the tensors of a micro-batch.

The rows of a step depend on the seed and the epoch alone: never on the number of GPUs, the size of a micro-batch or
packing. Only their partition does, and a step's loss is the mean over all its tokens, so training is the same
everywhere.
"""

import functools
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, Final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.dataset import TokenizedDataset
from finetune_trainer.data.encoding import IGNORE
from finetune_trainer.planning.shapes import filled_up, filled_up_targets, step_of

#: Rows scanned for the most tokens of a micro-batch.
_SCANNED_ROWS: Final = 16_384


def balance_batches(lengths: Sequence[int], bins: int, most: int) -> list[list[int]]:
    """Partition rows into bins with balanced token counts (LPT greedy, Graham 1969).

    Args:
        lengths: Tokens of each row.
        bins: Number of bins.
        most: Rows that a bin takes at most.

    Returns:
        The indices of each bin, in the order of `lengths`.
    """
    partition: list[list[int]] = [[] for _ in range(bins)]
    heap = [(0, bin_) for bin_ in range(bins)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        held, bin_ = heapq.heappop(heap)
        partition[bin_].append(index)
        if len(partition[bin_]) < most:
            heapq.heappush(heap, (held + lengths[index], bin_))
    return [sorted(indices) for indices in partition]


def bucket_by_length(lengths: Sequence[int], bins: int, most: int) -> list[list[int]]:
    """Partition rows into bins of about equally long rows, which wastes the least padding; see balance_batches."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    return [sorted(order[bin_ * most : (bin_ + 1) * most]) for bin_ in range(bins)]


@dataclass
class Steps:
    """All micro-batches of a training.

    Attributes:
        lengths: Tokens of each row.
        batch_size: Rows of a step (the effective batch).
        world: Number of processes.
        micro_batch: Rows of a micro-batch.
        seed: Of the order of rows.
        packed: Whether rows are packed; otherwise they are padded.
    """

    lengths: Sequence[int]
    batch_size: int
    world: int
    micro_batch: int
    seed: int
    packed: bool

    @classmethod
    def from_plan(cls, spec: FineTuneJobSpec, lengths: Sequence[int], plan: ExecutionPlan) -> "Steps":
        """Return the steps of a training on rows of `lengths` tokens, laid out by `plan`."""
        return cls(
            lengths=lengths,
            batch_size=spec.training.batch_size,
            world=plan.world_size or 1,
            micro_batch=plan.micro_batch_size or 1,
            seed=spec.training.seed,
            packed=bool(plan.packing),
        )

    def epoch(self, number: int) -> Iterator[list[list[list[int]]]]:
        """Yield each step as [micro-batch][process][index of row].

        The rest of an epoch is a step with fewer rows. A process for which no row is left gets an empty list.
        """
        order = _order(len(self.lengths), self.seed, number)
        for first in range(0, len(order), self.batch_size):
            yield self.partition(order[first : first + self.batch_size])

    def partition(self, rows: Sequence[int]) -> list[list[list[int]]]:
        """Partition the rows of one step: [micro-batch][process][index of row]."""
        lengths = [self.lengths[row] for row in rows]
        bins = self._passes(len(rows)) * self.world
        partition = (balance_batches if self.packed else bucket_by_length)(lengths, bins, self.micro_batch)
        found = [[rows[index] for index in indices] for indices in partition]
        return [found[first : first + self.world] for first in range(0, len(found), self.world)]

    @property
    def micro_batches(self) -> int:
        """Micro-batches of each process in one epoch."""
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole * self._passes(self.batch_size) + self._passes(rest)

    def _passes(self, rows: int) -> int:
        """Return the micro-batches of each process in a step of `rows` rows."""
        return -(-rows // (self.micro_batch * self.world))

    @property
    def most_tokens(self) -> int:
        """The most tokens of any micro-batch, padding included (of a long training: of its first steps)."""
        most, scanned = 0, 0
        for step in chain.from_iterable(self.epoch(number) for number in count()):
            most = max(most, *(self._tokens(rows) for processes in step for rows in processes))
            scanned += sum(len(rows) for processes in step for rows in processes)
            if scanned >= _SCANNED_ROWS:
                break
        return most

    def _tokens(self, rows: Sequence[int]) -> int:
        lengths = [self.lengths[row] for row in rows]
        return sum(lengths) if self.packed else len(lengths) * max(lengths, default=0)


def most_tokens(spec: FineTuneJobSpec, lengths: Sequence[int], world_size: int, packed: bool) -> Callable[[int], int]:
    """Return a function for planning: rows of a micro-batch -> the most tokens of any, for rows of `lengths` tokens."""

    @functools.cache
    def of_rows(micro_batch: int) -> int:
        plan = ExecutionPlan(micro_batch_size=micro_batch, world_size=world_size, packing=packed)
        return Steps.from_plan(spec, lengths, plan).most_tokens

    return of_rows


def _order(rows: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(rows, generator=generator).tolist()


class ProcessBatches(Sampler[list[int]]):
    """Yields the micro-batches of process `rank`, in order."""

    def __init__(self, steps: Steps, rank: int) -> None:
        self.steps, self._rank, self._epoch = steps, rank, 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps.epoch(self._epoch):
            yield from (processes[self._rank] for processes in step)

    def __len__(self) -> int:
        return self.steps.micro_batches


class _Rows(Dataset[tuple[list[int], list[int]]]):
    def __init__(self, rows: TokenizedDataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows.input_ids)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        return self._rows.input_ids[index], self._rows.labels[index]


class Loader(DataLoader[tuple[list[int], list[int]]]):
    """Yields the micro-batches of one process as tensors."""

    def __init__(
        self,
        rows: TokenizedDataset,
        batches: ProcessBatches,
        collate: Callable[[Sequence[tuple[list[int], list[int]]]], dict[str, Any]],
        pinned: bool,
    ) -> None:
        self._rows, self._batches, self._collate = _Rows(rows), batches, collate
        super().__init__(self._rows, batch_sampler=batches, collate_fn=collate, pin_memory=pinned)

    def set_epoch(self, epoch: int) -> None:
        self._batches.set_epoch(epoch)

    def example(self) -> dict[str, Any]:
        """Return a micro-batch for warming up, about as large as the others."""
        size = max(1, self._batches.steps.micro_batch)
        return self._collate([self._rows[index] for index in range(min(size, len(self._rows)))])


@dataclass
class Collate:
    """Makes the tensors of a micro-batch: rows packed end to end, or side by side and padded on the right.

    Both hold input_ids, `target_positions` int64 [targets] into the flattened input_ids, and `target_ids` int64
    [targets], the token that follows each: wherever a label is set, the first of a row excepted. Packed rows come with
    position_ids [1, tokens] and their starts as transformers' flash attention takes them (cu_seq_lens_*, max_length_*);
    `rows` and `longest`, the most of any micro-batch, keep shapes the same from pass to pass. A micro-batch without
    rows becomes two tokens and no target.

    With `few_shapes`, packed rows are filled up to one of a few numbers of tokens by a sequence of padding, which
    comes last and is seen by no row; targets are filled up likewise, by some whose `target_weights`, float32 [targets],
    are 0.
    """

    packed: bool
    pad_id: int
    rows: int = 0
    longest: int = 0
    few_shapes: bool = False

    def __call__(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        # Two tokens: of a dimension of one, torch.compile makes a graph of its own.
        rows = rows or [([self.pad_id] * 2, [IGNORE] * 2)]
        if not self.packed:
            return self._padded(rows)
        return self._filled_up(rows) if self.few_shapes else self._end_to_end(rows)

    def _end_to_end(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        lengths = [len(ids) for ids, _ in rows]
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        total = starts[-1]
        # Empty sequences fill up: kernels skip them, and compiled code sees the same shape in every pass.
        ends = torch.tensor(starts + [total] * (self.rows - len(rows)), dtype=torch.int32)
        longest = max(self.longest, *lengths)
        return {
            "input_ids": torch.tensor([[token for ids, _ in rows for token in ids]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
            **_targets([labels for _, labels in rows], starts),
        }

    def _filled_up(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        batch = self._end_to_end(rows)
        found = filled_up_batch(batch, sum(len(ids) for ids, _ in rows), self.pad_id)
        targets = len(batch["target_ids"])
        weights = torch.nn.functional.pad(torch.ones(targets), (0, len(found["target_ids"]) - targets))
        return found | {"target_weights": weights}

    def _padded(self, rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        width = max(len(ids) for ids, _ in rows)
        return {
            "input_ids": torch.tensor([ids + [self.pad_id] * (width - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
            **_targets([labels for _, labels in rows], [width * row for row in range(len(rows))]),
        }


def filled_up_batch(batch: Mapping[str, Any], real: int, pad_id: int) -> dict[str, Any]:
    """Return the packed rows `batch` of `real` tokens with a sequence of padding at the end, and with more targets."""
    total = filled_up(real)
    padding, device = total - real, batch["input_ids"].device
    ends = torch.cat([batch["cu_seq_lens_q"], batch["cu_seq_lens_q"].new_full((1,), total)])
    longest = max(batch["max_length_q"], step_of(real))
    targets = len(batch["target_ids"])
    unreal = filled_up_targets(targets, total) - targets
    pad = torch.nn.functional.pad
    return {
        **batch,
        "input_ids": pad(batch["input_ids"], (0, padding), value=pad_id),
        "position_ids": torch.cat([batch["position_ids"], torch.arange(padding, device=device)[None]], 1),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "target_positions": pad(batch["target_positions"], (0, unreal), value=total - 1),
        "target_ids": pad(batch["target_ids"], (0, unreal), value=pad_id),
    }


def real_tokens(batch: Mapping[str, Any]) -> int:
    """Return the tokens of a micro-batch without its padding."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    if "target_weights" in batch:
        return int(batch["cu_seq_lens_q"][-2])
    return int(batch["input_ids"].numel())


def real_targets(batch: Mapping[str, Any]) -> int:
    """Return the targets of a micro-batch without those that only fill it up."""
    weights = batch.get("target_weights")
    return len(batch["target_ids"]) if weights is None else int(weights.sum())


def _targets(labels: Sequence[Sequence[int]], starts: Sequence[int]) -> dict[str, torch.Tensor]:
    found = [
        (start + position, label)
        for each, start in zip(labels, starts, strict=False)
        for position, label in enumerate(each[1:])
        if label != IGNORE
    ]
    return {
        "target_positions": torch.tensor([position for position, _ in found], dtype=torch.int64),
        "target_ids": torch.tensor([label for _, label in found], dtype=torch.int64),
    }
