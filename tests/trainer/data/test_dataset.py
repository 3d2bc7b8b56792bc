"""Data files of every kind become the same rows, and every bad row is named by file and line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import structlog

from finetune_api.spec_data import Dataset
from finetune_trainer.data import (
    formats,
    ragged,
    readers,
)
from finetune_trainer.data.dataset import DataFile, Rows, encode, read_rows
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.rows import Row
from finetune_trainer.errors import DatasetInvalid

ROWS = [{"text": "one"}, {"text": 'two\nlines, "quoted"'}, {"text": "drei · 三"}]


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _rows(files: list[DataFile], **dataset: str) -> Rows:
    return read_rows(files, [], Dataset(train="file:///data", **dataset)).train


def _load(path: Path, **dataset: str) -> tuple[list[Any], str]:
    rows = _rows([DataFile(path, path.name)], **dataset)
    return [row.data for row in rows], rows.format.name


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_every_file_type_holds_the_same_rows(suffix: str, tmp_path: Path) -> None:
    assert _load(_write(tmp_path / f"rows{suffix}", ROWS)) == (ROWS, "text")


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "a", "id": 1}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
         "prompt-completion"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
    ],
)  # fmt: skip
def test_the_shape_of_rows_is_detected(row: dict[str, Any], shape: str, tmp_path: Path) -> None:
    assert _load(_write(tmp_path / "rows.jsonl", [row]))[1] == shape


def test_another_text_column_can_be_named(tmp_path: Path) -> None:
    assert _load(_write(tmp_path / "rows.csv", [{"body": "x", "id": "1"}]), text_field="body")[1] == "text"


def test_shards_are_read_in_order_and_bad_rows_name_theirs(tmp_path: Path) -> None:
    shards = [DataFile(_write(tmp_path / f"{i}.jsonl", [{"text": f"row {i}"}]), f"part/{i}.jsonl") for i in range(3)]
    rows = _rows(shards)
    assert [row.data["text"] for row in rows] == ["row 0", "row 1", "row 2"]
    shards[1].path.write_text('{"text": "fine"}\n\n{"text": 7}\n')
    with pytest.raises(DatasetInvalid, match=r"^part/1.jsonl:3: 'text' must be a string, not int$"):
        _rows(shards)


def test_an_empty_shard_among_others_is_said(tmp_path: Path) -> None:
    files = [_write(tmp_path / "a.jsonl", ROWS), tmp_path / "b.jsonl", tmp_path / "c.csv"]
    files[1].touch()
    files[2].write_text("text\n")
    shards = [DataFile(path, f"part/{path.name}", "spec.dataset.eval") for path in files]
    with structlog.testing.capture_logs() as logs:
        rows = _rows(shards[:2])
        _rows(shards)
    assert len(rows) == len(ROWS)
    assert [(entry["log_level"], entry["event"]) for entry in logs] == [
        ("warning", "spec.dataset.eval: part/b.jsonl: 1 of 2 data files has no rows"),
        ("warning", "spec.dataset.eval: part/b.jsonl, part/c.csv: 2 of 3 data files have no rows"),
    ]
    with pytest.raises(DatasetInvalid, match=r"^spec\.dataset\.eval: part/b\.jsonl, part/c\.csv: has no rows$"):
        _rows(shards[1:])


def test_messages_begin_with_the_field(tmp_path: Path) -> None:
    """The training and the evaluation file may well have the same name."""
    (tmp_path / "data.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(DatasetInvalid, match=r"^spec\.dataset\.train: data\.jsonl:1: 'text' must be a string"):
        _rows([DataFile(tmp_path / "data.jsonl", "data.jsonl", "spec.dataset.train")])


def test_rows_are_not_kept_but_read_again(tmp_path: Path) -> None:
    rows = _rows([DataFile(_write(tmp_path / "a.jsonl", ROWS), "a.jsonl")])
    assert [row.data for row in rows] == [row.data for row in rows] == ROWS
    assert (rows[1].line, rows[-1].data, [row.line for row in rows[:2]], rows[:0]) == (2, ROWS[2], [1, 2], [])
    with pytest.raises(IndexError):
        rows[3]


@pytest.mark.parametrize("name", ["dataset_infos.json", "dataset_info.json", ".git/x.json", "_temporary/a.csv", "a.md"])
def test_what_lies_beside_the_data_is_no_shard(name: str) -> None:
    assert not readers.is_data_file(name)
    assert readers.is_data_file("en/train.jsonl")


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
    path = _write(tmp_path / "rows.jsonl", [{"text": "word " * 200}] * count)
    tracemalloc.start()
    try:
        rows = _rows([DataFile(path, path.name)])
        encoded = encode(rows, rows.format, Encoder(Words(), 512), "training")
        data = encoded.dataset()
        stays, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert data[count - 1]["input_ids"] == [1000 + number for number in range(200)] + [0]
    needed = 2 * 4 * 201 * count
    assert stays < 1.5 * needed
    assert peak < 4 * needed


BAD_ROWS = [
    ("text", {"text": "  "}, "'text' is empty"),
    ("text", {"text": None}, "has no column 'text'"),
    ("text", ["x"], "is not a JSON object"),
    ("prompt-completion", {"prompt": "a"}, "has no column 'completion'"),
    ("prompt-completion", {"prompt": "a", "completion": []}, "must both be strings, or both lists of messages"),
    ("messages", {"messages": "hi"}, "must be a list of messages"),
    ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "'messages[0]'.role is 'robot'; it must be one of"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "'messages[0]'.content must be a string"),
]


@pytest.mark.parametrize(("shape", "data", "problem"), BAD_ROWS)
def test_a_bad_row_is_explained(shape: Any, data: Any, problem: str) -> None:
    row = formats.named(shape).checked(Row("f.jsonl", 4, data))
    assert problem in str(row)
    assert str(row).startswith("f.jsonl:4: ")


BAD_FILES = [
    ("a.json", '{"text": "x"}', "a.json:1: must be a JSON array of objects"),
    ("a.json", '[\n{"text": "x"}\n{"text": "y"}]', "a.json:3: is not JSON: ',' or ']' is missing"),
    ("a.json", '[\n{"text": "x"},\n{"text" "y"}]', "a.json:3: is not JSON"),
    ("a.json", '[{"text": "x"}', "is missing"),
    ("a.csv", "text,id\nx,1\ny\n", "a.csv:3: has 1 cells; the header names 2"),
    ("a.csv", 'text,id\n"x,1\n', "is not CSV"),
    ("a.parquet", "nonsense", "a.parquet: is not a readable Parquet file"),
    ("a.txt", "x", "a.txt: has an unknown file type; known are .csv, .json, .jsonl, .ndjson, .parquet"),
    ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: is not usable JSON: nested too deep"),
    ("a.csv", "", "a.csv: has no rows"),
]


@pytest.mark.parametrize(("name", "content", "problem"), BAD_FILES)
def test_a_bad_file_is_explained(name: str, content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DatasetInvalid) as raised:
        _load(tmp_path / name)
    assert problem in str(raised.value)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert _load(tmp_path / "a.jsonl")[0] == [{"text": "x"}]
