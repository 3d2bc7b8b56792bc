"""Data files of every kind become the same rows, and a bad file is named."""

from pathlib import Path

import pytest

from finetune_trainer.data import readers
from finetune_trainer.errors import DatasetInvalid
from support.trainer.data_files import ROWS, load, write


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".csv", ".parquet"])
def test_every_file_type_holds_the_same_rows(suffix: str, tmp_path: Path) -> None:
    assert load(write(tmp_path / f"rows{suffix}", ROWS)) == (ROWS, "text")


@pytest.mark.parametrize("name", ["dataset_infos.json", "dataset_info.json", ".git/x.json", "_temporary/a.csv", "a.md"])
def test_what_lies_beside_the_data_is_no_shard(name: str) -> None:
    assert not readers.is_data_file(name)
    assert readers.is_data_file("en/train.jsonl")


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
        load(tmp_path / name)
    assert problem in str(raised.value)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert load(tmp_path / "a.jsonl")[0] == [{"text": "x"}]
