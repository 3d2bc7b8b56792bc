"""Bad rows, however many and however long, cost no memory."""

import tracemalloc

import pytest

from finetune_trainer.data.rows import Row, refuse_bad_rows
from finetune_trainer.errors import DatasetInvalid


def test_bad_rows_are_counted_not_kept() -> None:
    """A megabyte of gzip may be a billion of them."""
    tracemalloc.start()
    with pytest.raises(DatasetInvalid) as raised:
        refuse_bad_rows(Row("a.jsonl", line, None, f"is {'x' * 100_000}") for line in range(1, 201))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    *shown, more = str(raised.value).splitlines()
    assert [line[:14] for line in shown[:2]] == ["a.jsonl:1: is ", "a.jsonl:2: is "]
    assert more == "… and 190 more bad rows"
    assert max(map(len, shown)) < 1100
    assert peak < 2 << 20
