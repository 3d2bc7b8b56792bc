"""Data files -> checked rows -> token ids with labels. Torch-free: every row is checked before torch is imported."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_data import Dataset as DatasetSpec
from finetune_trainer.data import formats, readers
from finetune_trainer.data.encoding import IGNORE, Encoder, RowProblem
from finetune_trainer.data.ragged import TokenLists
from finetune_trainer.data.row_format import ChatExample, RowFormat
from finetune_trainer.data.rows import Row, refuse_bad_rows
from finetune_trainer.errors import DatasetInvalid

if TYPE_CHECKING:
    from datasets import Dataset

log = structlog.get_logger(__name__)
_BATCH: Final = 1000
_FIELDS: Final = {"training": "spec.dataset.train", "evaluation": "spec.dataset.eval"}


@dataclass(frozen=True)
class DataFile:
    """One data file on this disk.

    Attributes:
        path: Where it is.
        name: What messages call it.
        field: The manifest's field that led to it.
        open_file: Opens it.
    """

    path: Path
    name: str
    field: str = ""
    open_file: readers.Open = lambda path: path.open("rb")

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


class Rows(Sequence[Row]):
    """The checked rows of data files. They are read from disk on every pass: a large set is never held in memory."""

    def __init__(self, files: Sequence[DataFile], row_format: RowFormat, count: int) -> None:
        self._files = tuple(files)
        self._count = count
        self.format = row_format

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(file.rows(self.format) for file in self._files)

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


@dataclass
class TokenizedDataset:
    """Token ids and labels (IGNORE where no loss is taken) of all rows.

    Attributes:
        truncated: Rows that were longer than training.maxLength.
        dropped: Rows left out because no token of theirs is learned.
    """

    input_ids: TokenLists = field(default_factory=TokenLists)
    labels: TokenLists = field(default_factory=TokenLists)
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return self.input_ids.tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.input_ids.longest

    def dataset(self) -> "Dataset":
        """Return the same for TRL: columns input_ids and labels."""
        import pyarrow
        from datasets import Dataset

        table = pyarrow.table({"input_ids": self.input_ids.arrow(), "labels": self.labels.arrow()})
        # Without a fingerprint, datasets computes one by copying and hashing all rows.
        return Dataset(table, fingerprint="encoded")


@dataclass(frozen=True)
class Datasets:
    """The tokenized splits, and the encoder that made them (evaluation makes its prompts with the same)."""

    train: TokenizedDataset
    eval: TokenizedDataset | None
    encoder: Encoder

    @property
    def splits(self) -> list[TokenizedDataset]:
        """The training split, then the evaluation split if there is one."""
        return [self.train, self.eval] if self.eval else [self.train]

    @property
    def longest(self) -> int:
        """Tokens of the longest row of all splits."""
        return max(split.longest for split in self.splits)


def read_rows(train: Sequence[DataFile], evaluation: Sequence[DataFile], dataset: DatasetSpec) -> RowSplits:
    """Read and check every row of the training and the evaluation files.

    Args:
        train: The files of `dataset.train`.
        evaluation: The files of `dataset.eval`; none if it is not set.
        dataset: The spec's section, for the format and its text column.

    Raises:
        DatasetInvalid: Rows are bad (the first ones are named by field, file and line), or there are none.
    """
    rows = _load(train, dataset)
    return RowSplits(rows, _load(evaluation, dataset) if evaluation else None)


def tokenize(rows: RowSplits, tokenizer: Any, spec: FineTuneJobSpec) -> Datasets:
    """Tokenize both splits, truncated at training.maxLength.

    Raises:
        DatasetInvalid: A row does not fit the chat template, or a split has no token to learn from.
    """
    encoder = Encoder(tokenizer, spec.training.max_length)
    train = encode(rows.train, rows.train.format, encoder, "training")
    held_out = encode(rows.eval, rows.eval.format, encoder, "evaluation") if rows.eval else None
    return Datasets(train, held_out, encoder)


def _load(files: Sequence[DataFile], dataset: DatasetSpec) -> Rows:
    """Check every row of `files`; warn of files without rows among others."""
    row_format = _format(files, dataset)
    counts = dict.fromkeys(files, 0)

    def counted() -> Iterator[Row]:
        for file in files:
            for row in file.rows(row_format):
                counts[file] += 1
                yield row

    refuse_bad_rows(counted())
    _warn_of_empty([file for file, count in counts.items() if not count], len(files))
    return Rows(files, row_format, sum(counts.values()))


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
    if dataset.format != "auto":
        return formats.named(dataset.format, dataset.text_field)
    head = islice(chain.from_iterable(file.raw_rows() for file in files), _BATCH)
    first = next((row for row in head if isinstance(row.data, dict)), None)
    if first is None:
        return formats.named("text", dataset.text_field)
    found = formats.detect(first.data, dataset.text_field)
    if found is None:
        columns = ", ".join(map(repr, first.data)) or "none"
        raise DatasetInvalid(
            f"{first.file}:{first.line}: columns are {columns}; needed are"
            f" {formats.needed_columns(dataset.text_field)} (dataset.textField names another text column)"
        )
    return found


def encode(rows: Sequence[Row], row_format: RowFormat, encoder: Encoder, role: str) -> TokenizedDataset:
    """Tokenize `rows`, truncate them, and leave out those without a token to learn from.

    Args:
        rows: Rows that were checked against `row_format`.
        row_format: Makes examples of them.
        encoder: Makes token ids of the examples.
        role: "training" or "evaluation", for messages.

    Raises:
        DatasetInvalid: A row cannot be encoded (named by field, file and line), or no token is left to learn from.
    """
    result, bad, chats = TokenizedDataset(), [], False
    for batch in _batches(rows):
        bad += [row for row in batch if row.problem]  # only when a file has changed since it was checked
        good = [row for row in batch if not row.problem]
        examples = [row_format.to_example(row.data) for row in good]
        chats = chats or any(isinstance(each, ChatExample) and not each.prompt_messages for each in examples)
        for row, encoded in zip(good, encoder.encode(examples), strict=True):
            if isinstance(encoded, RowProblem):
                bad.append(row.refuse(str(encoded)))
                continue
            result.truncated += encoded.truncated
            if all(label == IGNORE for label in encoded.labels[1:]):
                result.dropped += 1
                continue
            result.input_ids.append(encoded.input_ids)
            result.labels.append(encoded.labels)
    refuse_bad_rows(bad)
    _log(result, len(rows), row_format.name, encoder, role)
    if chats and role == "training" and not encoder.masks_assistant:
        log.warning("Chat template has no {% generation %} markers: training on all tokens, user turns included")
    if not result.input_ids:
        raise DatasetInvalid(
            f"{_FIELDS[role]}: no {role} row has a token left to learn from after truncation at training.maxLength"
            f" {encoder.max_length}"
        )
    return result


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rest = iter(rows)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _log(result: TokenizedDataset, total: int, name: str, encoder: Encoder, role: str) -> None:
    figures: dict[str, Any] = {"format": name, "rows": total, "tokens": result.tokens, "longest": result.longest}
    log.info(f"{role.capitalize()} rows are {name}: {total} rows, {result.tokens:,} tokens", **figures)
    if result.truncated:
        share = 100 * result.truncated / total
        log.warning(
            f"{result.truncated} of {total} {role} rows ({share:.1f} %) are longer than training.maxLength"
            f" {encoder.max_length} and were truncated",
            truncated=result.truncated,
        )
    if result.dropped:
        log.warning(
            f"{result.dropped} of {total} {role} rows dropped: no completion tokens left after truncation",
            dropped=result.dropped,
        )
