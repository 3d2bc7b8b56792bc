"""Token ids of many rows in compact memory."""

import pytest

from finetune_trainer.data import ragged


def test_token_lists_are_lists_in_a_tenth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "_CHUNK_ROWS", 2)
    lists = [[1, 2, 3], [], [70_000], [-100, 4]]
    kept = ragged.TokenLists()
    assert (len(kept), kept.tokens, kept.longest, kept.arrow().to_pylist()) == (0, 0, 0, [])
    kept = ragged.TokenLists()
    for ids in lists:
        kept.append(ids)
    assert (list(kept), kept[1:3], kept[-1], kept.arrow().to_pylist()) == (lists, lists[1:3], lists[-1], lists)
    assert (kept.tokens, kept.longest, kept.arrow().num_chunks) == (6, 3, 2)
