"""Read rows from JSON Lines, JSON, CSV and Parquet files."""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, TextIO

from finetune_trainer.data import compression
from finetune_trainer.data.rows import Row, half_character
from finetune_trainer.errors import DatasetInvalid, reason

#: Bytes of one row at most, and of a JSON array, which is read as a whole: a few compressed bytes may be very many.
_ROW_LIMIT: Final = 64 << 20
_ARRAY_LIMIT: Final = 2 << 30
_SURROGATE: Final = re.compile(r"\\u[dD][89a-fA-F]")
_LONG_NUMBER: Final = "is not usable JSON: a whole number has more than 4,300 digits"
_TOO_DEEP: Final = "is not usable JSON: nested too deep"

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
    suffix, compressed = compression.split_suffix(path.name)
    reader = _READERS.get(suffix)
    if reader is None or (compressed and suffix == ".parquet"):
        known = ", ".join(sorted(_READERS))
        raise DatasetInvalid(
            f"{name}: has an unknown file type; known are {known},"
            f" and all but .parquet with {', '.join(compression.SUFFIXES)}"
        )
    return _rows(reader, path, name, open_file, compressed)


def _rows(reader: Reader, path: Path, name: str, open_file: Open, compressed: str) -> Iterator[Row]:
    with open_file(path) as file:
        if not compressed:
            yield from reader(file, name)
            return
        try:
            yield from reader(compression.decompressed(file, compressed, name), name)
        except compression.DAMAGED as error:
            raise DatasetInvalid(f"{name}: is not a whole {compressed} file: {reason(error)}") from None


def is_data_file(path: str) -> bool:
    """Return whether the file at this path holds rows: its type is known, it is not hidden and no metadata."""
    suffix, compressed = compression.split_suffix(path)
    return suffix in _READERS and not (compressed and suffix == ".parquet") and not _is_beside_data(path)


def is_unread_data(path: str) -> bool:
    """Return whether the file at this path holds rows that cannot be read, for they are compressed in another way."""
    inner, last = Path(Path(path).stem).suffix.lower(), Path(path).suffix.lower()
    unread = last in compression.UNREAD or (last in compression.SUFFIXES and inner == ".parquet")
    return unread and inner in _READERS and not _is_beside_data(path)


def _is_beside_data(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return any(part.startswith((".", "_")) for part in parts) or parts[-1] in _ABOUT_DATA


def _json_lines(file: BinaryIO, name: str) -> Iterator[Row]:
    number = 0
    while raw := file.readline(_ROW_LIMIT + 1):
        number += 1
        if len(raw) > _ROW_LIMIT:
            raise DatasetInvalid(f"{name}:{number}: is longer than {_ROW_LIMIT >> 20} MiB")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        if raw.strip():
            yield _parsed(raw, name, number)


def _parsed(raw: bytes, name: str, line: int) -> Row:
    try:
        text = raw.decode("utf-8")
        data = json.loads(text)
    except UnicodeDecodeError:
        return Row(name, line, None, "is not UTF-8 text")
    except json.JSONDecodeError as error:
        return Row(name, line, None, _no_json(error))
    except ValueError:
        return Row(name, line, None, _LONG_NUMBER)
    except RecursionError:
        return Row(name, line, None, _TOO_DEEP)
    return _row(name, line, text, data)


def _no_json(error: json.JSONDecodeError) -> str:
    return f"is not JSON: {error.msg.removesuffix(' starting at')} at column {error.colno}"


def _row(name: str, line: int, text: str, data: Any) -> Row:
    """Return the row that JSON text is; it has a problem if it escapes half a character, which no tokenizer takes."""
    if not _SURROGATE.search(text):
        return Row(name, line, data)
    try:
        problem = half_character(json.dumps(data, ensure_ascii=False))
    except RecursionError:
        problem = _TOO_DEEP
    return Row(name, line, None, problem) if problem else Row(name, line, data)


def _json_array(file: BinaryIO, name: str) -> Iterator[Row]:
    raw = file.read(_ARRAY_LIMIT + 1)
    if len(raw) > _ARRAY_LIMIT:
        raise DatasetInvalid(f"{name}: is larger than {_ARRAY_LIMIT >> 30} GiB: write one object a line, as .jsonl")
    try:
        text = raw.decode("utf-8-sig")
        del raw
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
            yield Row(name, error.lineno, None, _no_json(error))
            return
        except (ValueError, RecursionError) as error:
            yield Row(name, line, None, _TOO_DEEP if isinstance(error, RecursionError) else _LONG_NUMBER)
            return
        yield _row(name, line, text[counted:position], value)
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


def _bounded(text: TextIO, name: str) -> Iterator[str]:
    """Yield lines; the csv module bounds a cell, and neither a line nor how many lines one row has."""
    number = 0
    while line := text.readline(_ROW_LIMIT + 1):
        number += 1
        if len(line) > _ROW_LIMIT:
            raise DatasetInvalid(f"{name}:{number}: is longer than {_ROW_LIMIT >> 20} MiB")
        yield line


def _csv(file: BinaryIO, name: str) -> Iterator[Row]:
    csv.field_size_limit(_ROW_LIMIT)
    lines = _bounded(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), name)
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_columns(header, name)
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
        opened = pyarrow.parquet.ParquetFile(file)
        _check_columns(opened.schema_arrow.names, name)
        for batch in opened.iter_batches(batch_size=1024):
            for data in batch.to_pylist():
                number += 1
                yield Row(name, number, {column: _without_nulls(value) for column, value in data.items()})
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DatasetInvalid(f"{name}: is not a readable Parquet file: {reason(error)}") from None


def _check_columns(names: list[str], file: str) -> None:
    if twice := next((each for each in names if each and names.count(each) > 1), None):
        raise DatasetInvalid(f"{file}: has two columns {twice!r}, and a row can have but one: rename one of them")


def _without_nulls(value: Any) -> Any:
    """Return `value` without the keys that its objects lack: Parquet gives all objects of a column the same keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


_READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _csv,
    ".parquet": _parquet,
}
