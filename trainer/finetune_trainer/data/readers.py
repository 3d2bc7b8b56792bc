"""Read rows from JSON Lines, JSON, CSV and Parquet files."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from finetune_trainer.data.rows import Row
from finetune_trainer.errors import DatasetInvalid

#: Opens a file to read its bytes.
Open = Callable[[Path], BinaryIO]
#: Yields the rows of an open file, which messages call by a name.
Reader = Callable[[BinaryIO, str], Iterator[Row]]

#: Metadata that tools leave beside the data (the `datasets` library skips the same names).
_ABOUT_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")


def read(path: Path, name: str, open_file: Open) -> Iterator[Row]:
    """Yield the rows of a file; rows that cannot be parsed carry their problem.

    Args:
        path: The file.
        name: What messages call it.
        open_file: Opens it.

    Raises:
        DatasetInvalid: The file's type is unknown, or it cannot be read at all.
    """
    suffix = path.suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None:
        raise DatasetInvalid(f"{name}: has an unknown file type; known are {', '.join(sorted(_READERS))}")
    return _rows(reader, path, name, open_file)


def _rows(reader: Reader, path: Path, name: str, open_file: Open) -> Iterator[Row]:
    with open_file(path) as file:
        yield from reader(file, name)


def is_data_file(path: str) -> bool:
    """Return whether the file at this path holds rows: its type is known, it is not hidden and no metadata."""
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return Path(path).suffix.lower() in _READERS and not hidden and parts[-1] not in _ABOUT_DATA


def _json_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    for number, raw in enumerate(file, 1):
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield _parsed(raw, name, number)


def _parsed(raw: bytes, name: str, line: int) -> Row:
    try:
        return Row(name, line, json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError:
        return Row(name, line, None, "is not UTF-8 text")
    except json.JSONDecodeError as error:
        return Row(name, line, None, f"is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Row(name, line, None, "is not usable JSON: nested too deep")


def _json_array(file: BinaryIO, name: str) -> Iterator[Row]:
    try:
        text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DatasetInvalid(f"{name}: is not UTF-8 text") from None
    decoder = json.JSONDecoder()
    position = _skip(text, 0)
    if not text.startswith("[", position):
        raise DatasetInvalid(f"{name}:1: must be a JSON array of objects; for one object a line name it .jsonl")
    position, line, counted = _skip(text, position + 1), 1, 0
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield Row(name, error.lineno, None, f"is not JSON: {error.msg} at column {error.colno}")
            return
        yield Row(name, line, value)
        position = _skip(text, position)
        if text.startswith(",", position):
            position = _skip(text, position + 1)
        elif not text.startswith("]", position):
            end = 1 + text.count("\n", 0, position)
            yield Row(name, end, None, "is not JSON: ',' or ']' is missing")
            return


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv(file: BinaryIO, name: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        end = reader.line_num
        for cells in reader:
            start, end = end + 1, reader.line_num
            if len(cells) == len(header):
                yield Row(name, start, dict(zip(header, cells, strict=True)))
            elif cells:
                yield Row(name, start, None, f"has {len(cells)} cells; the header names {len(header)}")
    except csv.Error as error:
        yield Row(name, reader.line_num, None, f"is not CSV: {error}")
    except UnicodeDecodeError:
        yield Row(name, reader.line_num + 1, None, "is not UTF-8 text")


def _parquet(file: BinaryIO, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for data in batch.to_pylist():
                number += 1
                yield Row(name, number, data)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetInvalid(f"{name}: is not a readable Parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _csv,
    ".parquet": _parquet,
}
