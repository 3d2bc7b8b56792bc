"""Which rows make a step, however they are dealt out, and how they lie in memory."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.batching import (
    Collate,
    Loader,
    ProcessBatches,
    Steps,
    balance_batches,
    bucket_by_length,
)
from finetune_trainer.data.dataset import TokenizedDataset
from finetune_trainer.data.encoding import IGNORE

some_lengths = st.lists(st.integers(1, 512), min_size=1, max_size=64)


def _steps(lengths: Sequence[int], **changes: Any) -> Steps:
    settings = {"batch_size": 16, "world": 1, "micro_batch": 4, "seed": 7, "packed": True}
    return Steps(lengths, **settings | changes)  # type: ignore[arg-type]


def _rows(step: list[list[list[int]]]) -> list[int]:
    return sorted(row for processes in step for rows in processes for row in rows)


@given(lengths=some_lengths, most=st.integers(1, 16), evenly=st.booleans())
def test_each_row_is_dealt_once_and_no_bin_overflows(lengths: list[int], most: int, evenly: bool) -> None:
    bins = -(-len(lengths) // most)
    dealt = (balance_batches if evenly else bucket_by_length)(lengths, bins, most)
    assert len(dealt) == bins
    assert sorted(index for indices in dealt for index in indices) == list(range(len(lengths)))
    assert all(len(indices) <= most and indices == sorted(indices) for indices in dealt)


@given(lengths=some_lengths, bins=st.integers(1, 8))
def test_bins_differ_by_no_more_than_one_row(lengths: list[int], bins: int) -> None:
    sums = [sum(lengths[index] for index in indices) for indices in balance_batches(lengths, bins, len(lengths))]
    assert max(sums) - min(sums) <= max(lengths)


def test_rows_that_are_padded_lie_beside_rows_of_their_length() -> None:
    assert bucket_by_length([9, 1, 8, 2, 7, 3], 3, 2) == [[0, 2], [4, 5], [1, 3]]


@given(
    rows=st.integers(1, 70), world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 2, 4]), packed=st.booleans()
)
def test_a_step_has_the_same_rows_however_it_is_dealt_out(rows: int, world: int, micro: int, packed: bool) -> None:
    lengths = [1 + row * 37 % 90 for row in range(rows)]
    plain = list(_steps(lengths, micro_batch=16).epoch(3))
    steps = _steps(lengths, world=world, micro_batch=micro, packed=packed)
    dealt = list(steps.epoch(3))
    assert [_rows(step) for step in dealt] == [_rows(step) for step in plain]
    assert sorted(row for step in dealt for row in _rows(step)) == list(range(rows))
    assert [len(step) for step in dealt[:-1]] == [16 // (world * micro)] * (len(dealt) - 1)
    assert all(len(processes) == world for step in dealt for processes in step)
    assert sum(len(step) for step in dealt) == steps.micro_batches


def test_every_epoch_and_every_seed_has_an_order_of_its_own() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return _rows(next(_steps([5] * 100, seed=seed).epoch(epoch)))

    orders = [first(seed, epoch) for seed in (1, 40) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert first(1, 2) == orders[2]


@pytest.mark.parametrize("packed", [False, True])
def test_the_most_tokens_are_those_of_the_largest_micro_batch(packed: bool) -> None:
    lengths = [20 + row * 61 % 97 for row in range(50)]
    steps = _steps(lengths, packed=packed)
    tokens = [
        sum(lengths[row] for row in rows) if packed else len(rows) * max(lengths[row] for row in rows)
        for epoch in range(400)
        for step in steps.epoch(epoch)
        for (rows,) in step
    ]
    assert steps.most_tokens == max(tokens)


ROWS = [([1, 11, 12, 13], [IGNORE, IGNORE, 12, 13]), ([2, 21], [2, 21]), ([3], [3])]


@pytest.mark.parametrize("packed", [False, True])
def test_a_target_is_the_token_that_follows_in_the_same_row(packed: bool) -> None:
    batch = Collate(packed, pad_id=0, rows=5, longest=9)(ROWS)
    ids = batch["input_ids"].flatten()
    found = zip(ids[batch["target_positions"]].tolist(), batch["target_ids"].tolist(), strict=True)
    assert list(found) == [(11, 12), (12, 13), (2, 21)]


def test_rows_end_to_end_have_positions_of_their_own_and_shapes_that_stay() -> None:
    batch = Collate(True, pad_id=0, rows=5, longest=9)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 11, 12, 13, 2, 21, 3]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 4, 6, 7, 7, 7]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == batch["max_length_k"] == 9


def test_rows_side_by_side_are_padded_on_the_right() -> None:
    batch = Collate(False, pad_id=0)(ROWS)
    assert batch["input_ids"].tolist() == [[1, 11, 12, 13], [2, 21, 0, 0], [3, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("packed", [False, True])
def test_a_process_without_rows_has_two_tokens_and_nothing_to_learn(packed: bool) -> None:
    batch = Collate(packed, pad_id=3, rows=2, longest=4)([])
    assert batch["input_ids"].tolist() == [[3, 3]]
    assert batch["target_ids"].numel() == 0


def test_each_process_loads_its_own_part_of_every_step() -> None:
    rows = TokenizedDataset()
    for row in range(21):
        rows.input_ids.append([row] * (1 + row % 5))
        rows.labels.append([row] * (1 + row % 5))
    steps = _steps(rows.input_ids.lengths, world=2, micro_batch=2)
    loaders = [Loader(rows, ProcessBatches(steps, rank), Collate(True, 99, 2, 5), pinned=False) for rank in (0, 1)]
    for loader in loaders:
        loader.set_epoch(1)
    found = [[set(batch["input_ids"].flatten().tolist()) for batch in loader] for loader in loaders]
    expected = [[set(processes[rank]) for step in steps.epoch(1) for processes in step] for rank in (0, 1)]
    assert found == expected
    assert [len(loader) for loader in loaders] == [len(each) for each in expected] == [6, 6]
