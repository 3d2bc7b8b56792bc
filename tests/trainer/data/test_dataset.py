"""Data files of every kind become the same rows, and every bad row is named by file and line."""

from pathlib import Path
from typing import Any

import pytest
import structlog

from finetune_trainer.data.dataset import encode
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.row_files import DataFile
from finetune_trainer.errors import DatasetInvalid
from support.trainer.data_files import ROWS, read, write


def test_shards_are_read_in_order_and_bad_rows_name_theirs(tmp_path: Path) -> None:
    shards = [DataFile(write(tmp_path / f"{i}.jsonl", [{"text": f"row {i}"}]), f"part/{i}.jsonl") for i in range(3)]
    rows = read(shards)
    assert [row.data["text"] for row in rows] == ["row 0", "row 1", "row 2"]
    shards[1].path.write_text('{"text": "fine"}\n\n{"text": 7}\n')
    with pytest.raises(DatasetInvalid, match=r"^part/1.jsonl:3: 'text' must be a string, not int$"):
        read(shards)


def test_an_empty_shard_among_others_is_said(tmp_path: Path) -> None:
    files = [write(tmp_path / "a.jsonl", ROWS), tmp_path / "b.jsonl", tmp_path / "c.csv"]
    files[1].touch()
    files[2].write_text("text\n")
    shards = [DataFile(path, f"part/{path.name}", "spec.dataset.eval") for path in files]
    with structlog.testing.capture_logs() as logs:
        rows = read(shards[:2])
        read(shards)
    assert len(rows) == len(ROWS)
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [
        ("warning", "spec.dataset.eval: part/b.jsonl: 1 of 2 data files has no rows"),
        ("warning", "spec.dataset.eval: part/b.jsonl, part/c.csv: 2 of 3 data files have no rows"),
    ]
    with pytest.raises(DatasetInvalid, match=r"^spec\.dataset\.eval: part/b\.jsonl, part/c\.csv: has no rows$"):
        read(shards[1:])


def test_messages_begin_with_the_field(tmp_path: Path) -> None:
    """The training and the evaluation file may well have the same name."""
    (tmp_path / "data.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(DatasetInvalid, match=r"^spec\.dataset\.train: data\.jsonl:1: 'text' must be a string"):
        read([DataFile(tmp_path / "data.jsonl", "data.jsonl", "spec.dataset.train")])


def test_rows_are_not_kept_but_read_again(tmp_path: Path) -> None:
    rows = read([DataFile(write(tmp_path / "a.jsonl", ROWS), "a.jsonl")])
    assert [row.data for row in rows] == [row.data for row in rows] == ROWS
    assert (rows[1].line, rows[-1].data, [row.line for row in rows[:2]], rows[:0]) == (2, ROWS[2], [1, 2], [])
    with pytest.raises(IndexError):
        rows[3]


def test_large_sets_do_not_lie_in_memory_as_python_objects(tmp_path: Path) -> None:
    """What stays of a row are its ids and labels, 4 bytes each; lists of lists took ten times that."""
    import tracemalloc

    import datasets  # noqa: F401 -- not counted

    class Words:
        chat_template = bos_token_id = None
        eos_token_id = 0

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[1000 + number for number in range(200)] for _ in texts]}

    count = 5000
    path = write(tmp_path / "rows.jsonl", [{"text": "word " * 200}] * count)
    tracemalloc.start()
    try:
        rows = read([DataFile(path, path.name)])
        encoded = encode(rows, rows.format, Encoder(Words(), 512), "training")
        data = encoded.dataset()
        stays, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data[count - 1]["input_ids"] == [1000 + number for number in range(200)] + [0]
    needed = 2 * 4 * 201 * count
    assert stays < 1.5 * needed
    assert peak < 4 * needed
