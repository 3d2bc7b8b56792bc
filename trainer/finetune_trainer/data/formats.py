"""Rows out of JSON Lines, JSON, CSV and Parquet files, each with its place, and what shape of row they have."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from finetune_trainer.errors import DatasetInvalid

Format = Literal["text", "prompt-completion", "messages"]
#: How many bad rows are shown before the rest is only counted.
SHOWN_PROBLEMS = 10
#: What tools leave beside the data (the `datasets` library passes over the same names).
_ABOUT_DATA = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
_ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True)
class Row:
    """One row of a file. `line` counts from 1 (Parquet: the row's number)."""

    file: str
    line: int
    data: Any
    problem: str = ""

    def refuse(self, problem: str) -> "Row":
        return Row(self.file, self.line, None, problem)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.problem}"


def read(path: Path, name: str) -> Iterator[Row]:
    """The rows of the file at `path`, called `name` in messages; rows that cannot be parsed carry their problem.

    Raises DatasetInvalid for a file of an unknown kind, or one that cannot be read at all.
    """
    suffix = path.suffix.lower()
    reader = _READERS.get(suffix)
    if reader is None:
        raise DatasetInvalid(f"{name}: has an unknown file type; known are {', '.join(sorted(_READERS))}")
    return reader(path, name)


def is_data_file(path: str) -> bool:
    """Whether a file at this path below a prefix counts as a shard: of a known kind, not hidden, not about the data."""
    parts = PurePosixPath(path).parts
    hidden = any(part.startswith((".", "_")) for part in parts)
    return Path(path).suffix.lower() in _READERS and not hidden and parts[-1] not in _ABOUT_DATA


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as file:
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


def _json_array(path: Path, name: str) -> Iterator[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
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


def _csv(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
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


def _parquet(path: Path, name: str) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for data in batch.to_pylist():
                number += 1
                yield Row(name, number, data)
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetInvalid(f"{name}: is not a readable Parquet file: {str(error).splitlines()[0]}") from None


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _csv,
    ".parquet": _parquet,
}


def detect(columns: set[str], text_field: str) -> Format | None:
    """The shape of rows that have `columns`, None when they fit no shape."""
    if "messages" in columns:
        return "messages"
    if {"prompt", "completion"} <= columns:
        return "prompt-completion"
    return "text" if text_field in columns else None


def check(row: Row, shape: Format, text_field: str) -> Row:
    """`row`, or the row with its problem when it is not of `shape`."""
    if row.problem:
        return row
    if not isinstance(row.data, dict):
        return row.refuse("is not a JSON object")
    if shape == "messages":
        problem = _column(row.data, "messages") or _messages_problem("messages", row.data["messages"])
    elif shape == "prompt-completion":
        problem = _prompt_completion_problem(row.data)
    else:
        problem = _column(row.data, text_field) or _text_problem(text_field, row.data[text_field])
    return row.refuse(problem) if problem else row


def _column(data: dict[str, Any], name: str) -> str:
    if data.get(name) is not None:
        return ""
    return f"has no column {name!r}; it has {', '.join(map(repr, data)) or 'none'}"


def _text_problem(name: str, value: Any) -> str:
    if not isinstance(value, str):
        return f"{name!r} must be a string, not {type(value).__name__}"
    return "" if value.strip() else f"{name!r} is empty"


def _prompt_completion_problem(data: dict[str, Any]) -> str:
    if problem := _column(data, "prompt") or _column(data, "completion"):
        return problem
    prompt, completion = data["prompt"], data["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return _text_problem("prompt", prompt) or _text_problem("completion", completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages_problem("prompt", prompt) or _messages_problem("completion", completion)
    return "'prompt' and 'completion' must both be strings, or both lists of messages"


def _messages_problem(name: str, value: Any) -> str:
    if not isinstance(value, list) or not value:
        return f"{name!r} must be a list of messages with role and content, and not empty"
    for index, message in enumerate(value):
        where = f"'{name}[{index}]'"
        if not isinstance(message, dict):
            return f"{where} must be an object with role and content"
        if message.get("role") not in _ROLES:
            return f"{where}.role is {message.get('role')!r}; it must be one of {', '.join(_ROLES)}"
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            return f"{where}.content must be a string"
    return ""
