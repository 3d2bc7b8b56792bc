"""Data files of every kind become the same rows, and a bad file is named."""

import gzip
import lzma
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
    (
        "a.txt",
        "x",
        "a.txt: has an unknown file type; known are .csv, .json, .jsonl, .ndjson, .parquet, and all but",
    ),
    ("a.jsonl", "[" * 100_000 + "\n", "a.jsonl:1: is not usable JSON: nested too deep"),
    ("a.csv", "", "a.csv: has no rows"),
    ("a.csv", "text,id,text\nx,1,y\n", "a.csv: has two columns 'text', and a row can have but one"),
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


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_compressed_files_hold_the_same_rows(kind: str, suffix: str, tmp_path: Path) -> None:
    plain = write(tmp_path / f"rows{kind}", ROWS).read_bytes()
    path = tmp_path / f"rows{kind}{suffix}"
    path.write_bytes(_compressed(plain, suffix))
    assert readers.is_data_file(path.name)
    assert load(path) == (ROWS, "text")
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DatasetInvalid, match=rf"^rows{kind}{suffix}: is not a whole {suffix} file: "):
        load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(DatasetInvalid, match=rf"^rows{kind}{suffix}: is not a whole {suffix} file: "):
        load(path)


def test_compressed_files_of_several_parts_are_read_to_the_end(tmp_path: Path) -> None:
    for suffix in (".gz", ".xz", ".zst"):
        path = tmp_path / f"rows.jsonl{suffix}"
        path.write_bytes(_compressed(b'{"text": "one"}\n', suffix) + _compressed(b'{"text": "two"}\n', suffix))
        assert [row["text"] for row in load(path)[0]] == ["one", "two"]


def _compressed(plain: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        import pyarrow

        return pyarrow.Codec("zstd").compress(plain, asbytes=True)
    return gzip.compress(plain) if suffix == ".gz" else lzma.compress(plain)


@pytest.mark.parametrize("name", ["a.jsonl.bz2", "en/a.csv.zip", "a.parquet.gz", "a.json.LZ4"])
def test_what_is_compressed_in_another_way_is_known_for_data(name: str) -> None:
    assert readers.is_unread_data(name)
    assert not readers.is_data_file(name)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl", "a.tar.gz", "README.md.zip", ".git/a.jsonl.bz2"])
def test_what_is_read_or_no_data_is_not(name: str) -> None:
    assert not readers.is_unread_data(name)


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (r'{"text": "bad \ud83d half"}', r"holds \ud83d, half of a surrogate pair, which is no character"),
        (r'{"text": "bad \uDE00"}', r"holds \ude00, half of a surrogate pair"),
        ('{"text": "x", "id": ' + "1" * 5000 + "}", "is not usable JSON: a whole number has more than 4,300 digits"),
        ('{"text": ' + "[" * 100_000, "is not usable JSON: nested too deep"),
    ],
    ids=["first half", "second half", "long number", "deep"],
)
def test_json_that_no_tokenizer_takes_is_a_bad_row(suffix: str, row: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_text(f'{{"text": "fine"}}\n{row}\n' if suffix == ".jsonl" else f'[{{"text": "fine"}},\n{row}]')
    with pytest.raises(DatasetInvalid) as raised:
        load(path)
    assert f"a{suffix}:2: {problem}" in str(raised.value)


def test_whole_surrogate_pairs_and_escaped_backslashes_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "\ud83d\ude00 and \\ud83d"}')
    assert load(tmp_path / "a.jsonl")[0] == [{"text": "😀 and \\ud83d"}]


def test_a_row_without_an_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(readers, "_ROW_LIMIT", 1 << 20)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n"' + b"x" * (8 << 20)))
    with pytest.raises(DatasetInvalid, match=r"^a\.jsonl\.gz:2: is longer than 1 MiB$"):
        load(tmp_path / "a.jsonl.gz")
    monkeypatch.setattr(readers, "_ARRAY_LIMIT", 1 << 20)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * (8 << 20)))
    with pytest.raises(DatasetInvalid, match=r"^a\.json\.gz: is larger than"):
        load(tmp_path / "a.json.gz")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text\nx\n" + b"," * (8 << 20)))
    with pytest.raises(DatasetInvalid, match=r"^a\.csv\.gz:3: is longer than 1 MiB$"):
        load(tmp_path / "a.csv.gz")


def test_a_row_that_cannot_be_used_tells_no_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x", "\\ud800": "y"}\n{"prompt": "x", "completion": "y"}\n')
    with pytest.raises(DatasetInvalid, match=r"^a\.jsonl:1: holds \\ud800, half of a surrogate pair[^\n]*$"):
        load(tmp_path / "a.jsonl")


def test_parquets_nulls_in_objects_are_no_keys(tmp_path: Path) -> None:
    """Parquet gives every object of a column the same keys; a template takes a key without a value for a value."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "name": "n"}], "x": None}
    ]
    [row] = load(write(tmp_path / "a.parquet", rows))[0]
    assert row == rows[0]


def test_columns_of_one_name_are_not_told_apart_in_parquet_either(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    pyarrow.parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DatasetInvalid, match=r"a\.parquet: has two columns 'text'"):
        load(tmp_path / "a.parquet")


def test_columns_without_a_name_are_what_a_spreadsheet_leaves(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,,\nx,,\n")
    assert load(tmp_path / "a.csv")[1] == "text"
