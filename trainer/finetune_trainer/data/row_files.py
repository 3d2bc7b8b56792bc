"""Data files -> checked rows, read from disk on every pass. Torch-free: rows are checked before torch is imported."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Final, overload

import structlog

from finetune_api.spec_data import Dataset as DatasetSpec
from finetune_trainer.data import formats, readers
from finetune_trainer.data.row_format import FormatOptions, RowFormat
from finetune_trainer.data.rows import Row, refuse_bad_rows
from finetune_trainer.errors import ConfigInvalid, DatasetInvalid

log = structlog.get_logger(__name__)
_HEAD: Final = 1000


@dataclass(frozen=True)
class DataFile:
    """One data file on this disk.

    Attributes:
        path: Where it is.
        name: What messages call it.
        field: The manifest's field that led to it.
        open_file: Opens it.
        weight: How often an epoch holds each of its rows (`dataset.sources`).
    """

    path: Path
    name: str
    field: str = ""
    open_file: readers.Open = lambda path: path.open("rb")
    weight: float = 1

    @property
    def full_name(self) -> str:
        """The beginning of a message about it: 'spec.dataset.train: part/1.jsonl'."""
        return f"{self.field}: {self.name}" if self.field else self.name

    def rows(self, row_format: RowFormat) -> Iterator[Row]:
        """Yield its rows, each with its problem if it is not of `row_format`."""
        return (row_format.checked(row) for row in self.raw_rows())

    def raw_rows(self) -> Iterator[Row]:
        """Yield its rows as they are."""
        return readers.read(self.path, self.full_name, self.open_file)


@dataclass(frozen=True)
class Choice:
    """Which rows of the training files are taken, by what they say: the same in every attempt.

    Attributes:
        seed: Of the choice (`training.seed`).
        fraction: Part of the rows that is held out (`dataset.evalFraction`).
        held_out: Whether these rows are taken, or the others.
    """

    seed: int = 0
    fraction: float = 0
    held_out: bool = False

    def taken(self, row: Row, weight: float) -> int:
        """Return how often the row is taken. Held-out rows are evaluated once, whatever their weight."""
        if row.problem:
            return int(not self.held_out)
        if self.fraction and (self._number(row, "hold out") < self.fraction) != self.held_out:
            return 0
        if self.held_out:
            return 1
        whole = int(weight)
        return whole + (weight > whole and self._number(row, "weigh") < weight - whole)

    def _number(self, row: Row, purpose: str) -> float:
        """Return a number from 0 to 1 that is the row's own for this purpose."""
        said = json.dumps(row.data, sort_keys=True, default=str)
        digest = hashlib.blake2b(f"{self.seed} {purpose} {said}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64


class Rows(Sequence[Row]):
    """The checked rows of data files. They are read from disk on every pass: a large set is never held in memory."""

    def __init__(
        self, files: Sequence[DataFile], row_format: RowFormat, count: int, choice: Choice | None = None
    ) -> None:
        self._files = tuple(files)
        self._count = count
        self._choice = choice
        self.format = row_format

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(map(self._of_file, self._files))

    def _of_file(self, file: DataFile) -> Iterator[Row]:
        choice = self._choice
        if choice is None:
            return file.rows(self.format)
        return chain.from_iterable(repeat(row, choice.taken(row, file.weight)) for row in file.rows(self.format))

    @overload
    def __getitem__(self, wanted: int) -> Row: ...
    @overload
    def __getitem__(self, wanted: slice) -> list[Row]: ...
    def __getitem__(self, wanted: int | slice) -> Row | list[Row]:
        if isinstance(wanted, slice):
            return list(islice(self, *wanted.indices(len(self))))
        return next(islice(self, range(len(self))[wanted], None))


@dataclass(frozen=True)
class RowSplits:
    """The training rows, and the evaluation rows if the spec names any."""

    train: Rows
    eval: Rows | None = None


def read_rows(
    train: Sequence[DataFile], evaluation: Sequence[DataFile], dataset: DatasetSpec, seed: int = 0
) -> RowSplits:
    """Read and check every row of the training and the evaluation files.

    Args:
        train: The files of `dataset.train`.
        evaluation: The files of `dataset.eval`; none if it is not set.
        dataset: The spec's section: the format, its columns, how much is held out.
        seed: Of what is held out, and of parts of sources.

    Raises:
        DatasetInvalid: Rows are bad (the first ones are named by field, file and line), or there are none.
    """
    fraction = dataset.eval_fraction or 0
    if not fraction and all(file.weight == 1 for file in train):
        rows = _load(train, dataset, [None])
    else:
        choices = [Choice(seed, fraction), *([Choice(seed, fraction, held_out=True)] if fraction else [])]
        rows = _load(train, dataset, choices)
        _refuse_nothing(rows, train, dataset)
    held_out = _load(evaluation, dataset, [None]) if evaluation else rows[1:]
    return RowSplits(rows[0], held_out[0] if held_out else None)


def unchecked_splits(
    train: Sequence[DataFile], evaluation: Sequence[DataFile], dataset: DatasetSpec, seed: int = 0
) -> RowSplits:
    """Return the rows that read_rows would, bad ones among them, and none of them counted.

    Raises:
        DatasetInvalid: The format cannot be told from the first rows.
    """
    fraction = dataset.eval_fraction or 0
    row_format = _format(train, dataset)
    rows = Rows(train, row_format, 0, Choice(seed, fraction))
    if evaluation:
        return RowSplits(rows, Rows(evaluation, _format(evaluation, dataset), 0))
    return RowSplits(rows, Rows(train, row_format, 0, Choice(seed, fraction, held_out=True)) if fraction else None)


def _load(files: Sequence[DataFile], dataset: DatasetSpec, choices: Sequence[Choice | None]) -> list[Rows]:
    """Check every row of `files`, and return what each choice takes; warn of files without rows among others."""
    row_format = _format(files, dataset)
    counts, taken = dict.fromkeys(files, 0), [0] * len(choices)

    def counted() -> Iterator[Row]:
        for file in files:
            for row in file.rows(row_format):
                counts[file] += 1
                for index, choice in enumerate(choices):
                    taken[index] += 1 if choice is None or row.problem else choice.taken(row, file.weight)
                yield row

    refuse_bad_rows(counted())
    _warn_of_empty([file for file, count in counts.items() if not count], len(files))
    return [Rows(files, row_format, count, choice) for choice, count in zip(choices, taken, strict=True)]


def _refuse_nothing(splits: Sequence[Rows], files: Sequence[DataFile], dataset: DatasetSpec) -> None:
    """Refuse a choice that takes no row."""
    for rows, role in zip(splits, ("train on", "hold out"), strict=False):
        if not len(rows):
            field = "evalFraction" if dataset.eval_fraction else "sources"
            raise DatasetInvalid(f"spec.dataset.{field}: leaves no row to {role}: give more rows, or other shares")


def _warn_of_empty(empty: Sequence[DataFile], among: int) -> None:
    if not empty:
        return
    names = ", ".join(file.name for file in empty[:3]) + (" …" if len(empty) > 3 else "")
    where = f"{empty[0].field}: {names}" if empty[0].field else names
    if len(empty) == among:
        raise DatasetInvalid(f"{where}: has no rows")
    log.warning(f"{where}: {len(empty)} of {among} data files {'has' if len(empty) == 1 else 'have'} no rows")


def _format(files: Sequence[DataFile], dataset: DatasetSpec) -> RowFormat:
    """Return the spec's format; for `auto` the one that the columns of the first usable row fit."""
    options = FormatOptions.of(dataset)
    head = islice(chain.from_iterable(file.raw_rows() for file in files), _HEAD)
    first = next((row for row in head if isinstance(row.data, dict)), None)
    if dataset.format != "auto":
        found = formats.named(dataset.format, options)
    elif first is None:
        return formats.named("text", options)
    else:
        detected = formats.detect(first.data, options)
        if detected is None:
            columns = ", ".join(map(repr, first.data)) or "none"
            raise DatasetInvalid(
                f"{first.file}:{first.line}: columns are {columns}; needed are {formats.needed_columns(options)}"
                " (dataset.columns gives other names)"
            )
        found = detected
    _check_columns(found, dataset)
    if first is not None and (unused := found.unused(first.data)):
        log.info(f"{first.file}: Nothing is learned of the columns {', '.join(unused[:20])}", format=found.name)
    return found


def _check_columns(row_format: RowFormat, dataset: DatasetSpec) -> None:
    """Refuse names for columns that the format does not have."""
    known = (*row_format.columns, *row_format.optional)
    if strange := [column for column in dataset.columns or () if column not in known]:
        names = ", ".join(known)
        raise ConfigInvalid(f"spec.dataset.columns: {strange[0]!r} is no column of {row_format.name} rows, but {names}")
