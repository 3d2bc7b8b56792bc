"""Data files of every kind become the same rows, and every bad row is named by file and line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import formats
from finetune_trainer.data import Shard, load_rows
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


def _load(path: Path, wanted: str = "auto", text_field: str = "text") -> tuple[list[Any], str]:
    rows, shape = load_rows([Shard(path, path.name)], wanted, text_field)
    return [row.data for row in rows], shape


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
    shards = [Shard(_write(tmp_path / f"{i}.jsonl", [{"text": f"row {i}"}]), f"part/{i}.jsonl") for i in range(3)]
    rows, _ = load_rows(shards, "auto", "text")
    assert [row.data["text"] for row in rows] == ["row 0", "row 1", "row 2"]
    shards[1].path.write_text('{"text": "fine"}\n\n{"text": 7}\n')
    with pytest.raises(DatasetInvalid, match=r"^part/1.jsonl:3: 'text' must be a string, not int$"):
        load_rows(shards, "auto", "text")


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
    row = formats.check(formats.Row("f.jsonl", 4, data), shape, "text")
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
