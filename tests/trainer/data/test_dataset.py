"""Data files of every kind become the same rows, and every bad row is named by file and line."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import structlog

from finetune_api.spec_data import Dataset
from finetune_trainer.data.dataset import encode
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.row_files import DataFile, read_rows
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


class TestHeldOut:
    """`dataset.evalFraction` and `dataset.sources`: which rows are taken depends on the seed and the row alone."""

    def _split(self, folder: Path, rows: list[dict[str, Any]], seed: int = 42, name: str = "a") -> list[list[str]]:
        file = DataFile(write(folder / f"{name}.jsonl", rows), "rows.jsonl")
        splits = read_rows([file], [], Dataset(train="file:///data", eval_fraction=0.2), seed)
        assert splits.eval is not None
        both = [[row.data["text"] for row in part] for part in (splits.train, splits.eval)]
        assert [len(splits.train), len(splits.eval)] == [len(part) for part in both]
        return both

    def test_about_the_fraction_is_held_out_and_nothing_twice(self, tmp_path: Path) -> None:
        rows = [{"text": f"row {number}"} for number in range(1000)]
        train, held_out = self._split(tmp_path, rows)
        assert 150 < len(held_out) < 250
        assert sorted(train + held_out) == sorted(row["text"] for row in rows)

    def test_a_row_stays_where_it_is_whatever_becomes_of_the_others(self, tmp_path: Path) -> None:
        rows = [{"text": f"row {number}"} for number in range(100)]
        _, held_out = self._split(tmp_path, rows)
        _, of_half = self._split(tmp_path, rows[50:][::-1], name="b")
        assert set(of_half) == set(held_out) & {row["text"] for row in rows[50:]}
        assert self._split(tmp_path, rows, seed=7)[1] != held_out

    def test_equal_rows_stay_together(self, tmp_path: Path) -> None:
        train, held_out = self._split(tmp_path, [{"text": f"row {number % 30}"} for number in range(300)])
        assert not set(train) & set(held_out)

    def test_no_row_left_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetInvalid, match=r"^spec\.dataset\.evalFraction: leaves no row to (hold out|train on)"):
            self._split(tmp_path, [{"text": "one"}])

    def test_a_weight_says_how_often_an_epoch_holds_a_row(self, tmp_path: Path) -> None:
        files = [
            DataFile(
                write(tmp_path / f"{weight}.jsonl", [{"text": f"{weight} {n}"} for n in range(400)]), "x", weight=weight
            )
            for weight in (1, 0.25, 2.5)
        ]
        dataset = Dataset(sources=[{"uri": "file:///data"}])
        rows = [row.data["text"] for row in read_rows(files, [], dataset).train]
        counts = [Counter(text for text in rows if text.startswith(f"{weight} ")) for weight in (1, 0.25, 2.5)]
        assert set(counts[0].values()) == {1}
        assert len(counts[0]) == len(counts[2]) == 400
        assert 60 < len(counts[1]) < 140
        assert set(counts[1].values()) == {1}
        assert set(counts[2].values()) == {2, 3}
        assert rows == [row.data["text"] for row in read_rows(files, [], dataset).train]
