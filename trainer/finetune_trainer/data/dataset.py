"""Data files -> checked rows -> token ids with labels. Every row is looked at before any weight is loaded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import structlog

from finetune_trainer.data import formats, readers
from finetune_trainer.data.encoding import IGNORE, Encoder, RowProblem
from finetune_trainer.data.formats import Format
from finetune_trainer.data.ragged import TokenLists
from finetune_trainer.data.rows import Row, refuse_bad_rows
from finetune_trainer.errors import DatasetInvalid

if TYPE_CHECKING:
    from datasets import Dataset

log = structlog.get_logger(__name__)
_BATCH: Final = 1000
_FIELDS: Final = {"training": "spec.dataset.train", "evaluation": "spec.dataset.eval"}


@dataclass(frozen=True)
class DataFile:
    """One data file: where it lies here, its name for messages, and the manifest's field that led to it."""

    path: Path
    name: str
    field: str = ""

    @property
    def place(self) -> str:
        """What a message begins with: 'spec.dataset.train: part/1.jsonl'."""
        return f"{self.field}: {self.name}" if self.field else self.name

    def rows(self, shape: Format, text_field: str) -> Iterator[Row]:
        """Its rows, each with its problem when it is not of `shape`."""
        return (formats.check(row, shape, text_field) for row in readers.read(self.path, self.place))


class Rows(Sequence[Row]):
    """The rows of data files, read anew each time they are gone through: a large set never lies in memory."""

    def __init__(self, shards: Sequence[DataFile], shape: Format, text_field: str, count: int) -> None:
        self._shards = tuple(shards)
        self._shape: Format = shape
        self._text_field = text_field
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        return chain.from_iterable(shard.rows(self._shape, self._text_field) for shard in self._shards)

    @overload
    def __getitem__(self, wanted: int) -> Row: ...
    @overload
    def __getitem__(self, wanted: slice) -> list[Row]: ...
    def __getitem__(self, wanted: int | slice) -> Row | list[Row]:
        if isinstance(wanted, slice):
            return list(islice(self, *wanted.indices(len(self))))
        return next(islice(self, range(len(self))[wanted], None))


@dataclass
class TokenizedDataset:
    """A tokenized set of rows: ids and labels (IGNORE where no loss is taken), and what was done to them."""

    input_ids: TokenLists = field(default_factory=TokenLists)
    labels: TokenLists = field(default_factory=TokenLists)
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return self.input_ids.tokens

    @property
    def longest(self) -> int:
        return self.input_ids.longest

    def dataset(self) -> "Dataset":
        """For TRL: columns input_ids and labels."""
        import pyarrow
        from datasets import Dataset

        table = pyarrow.table({"input_ids": self.input_ids.arrow(), "labels": self.labels.arrow()})
        # Without a fingerprint given, datasets makes one by copying and hashing all of it.
        return Dataset(table, fingerprint="encoded")


def load_rows(shards: Sequence[DataFile], wanted: str, text_field: str) -> tuple[Rows, Format]:
    """Read and check every row of `shards`; a file without rows beside others is said. `wanted` is dataset.format.

    Raises DatasetInvalid: with the first bad rows, each with field, file and line, or when there is no row at all.
    """
    head = chain.from_iterable(readers.read(shard.path, shard.place) for shard in shards)
    shape = _shape(list(islice(head, _BATCH)), wanted, text_field)
    counts = dict.fromkeys(shards, 0)

    def counted() -> Iterator[Row]:
        for shard in shards:
            for row in shard.rows(shape, text_field):
                counts[shard] += 1
                yield row

    refuse_bad_rows(counted())
    _notice_empty([shard for shard, count in counts.items() if not count], len(shards))
    return Rows(shards, shape, text_field, sum(counts.values())), shape


def _notice_empty(empty: Sequence[DataFile], among: int) -> None:
    if not empty:
        return
    names = ", ".join(shard.name for shard in empty[:3]) + (" …" if len(empty) > 3 else "")
    where = f"{empty[0].field}: {names}" if empty[0].field else names
    if len(empty) == among:
        raise DatasetInvalid(f"{where}: has no rows")
    log.warning(f"{where}: {len(empty)} of {among} data files {'has' if len(empty) == 1 else 'have'} no rows")


def _shape(head: Sequence[Row], wanted: str, text_field: str) -> Format:
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    first = next((row for row in head if isinstance(row.data, dict)), None)
    if first is None:
        return "text"
    shape = formats.detect(set(first.data), text_field)
    if shape is None:
        found = ", ".join(map(repr, first.data)) or "none"
        raise DatasetInvalid(
            f"{first.file}:{first.line}: columns are {found}; needed are {text_field!r}, or 'prompt' and 'completion',"
            " or 'messages' (dataset.textField names another text column)"
        )
    return shape


def encode(rows: Sequence[Row], shape: Format, encoder: Encoder, role: str) -> TokenizedDataset:
    """Tokenize `rows`, cut them at the encoder's maximum, and leave out those without a token to learn from.

    `role` is "training" or "evaluation". Raises DatasetInvalid, with field, file and line.
    """
    result, bad = TokenizedDataset(), []
    for batch in _batches(rows):
        bad += [row for row in batch if row.problem]  # only when a file has changed since it was checked
        good = [row for row in batch if not row.problem]
        for row, encoded in zip(good, encoder.encode([row.data for row in good], shape), strict=True):
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
    _log(result, len(rows), shape, encoder, role)
    if not result.input_ids:
        raise DatasetInvalid(
            f"{_FIELDS[role]}: no {role} row has a token left to learn from after cutting at training.maxLength"
            f" {encoder.max_length}"
        )
    return result


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rest = iter(rows)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _log(result: TokenizedDataset, total: int, shape: Format, encoder: Encoder, role: str) -> None:
    figures: dict[str, Any] = {"format": shape, "rows": total, "tokens": result.tokens, "longest": result.longest}
    log.info(f"{role.capitalize()} rows are {shape}: {total} rows, {result.tokens:,} tokens", **figures)
    if result.truncated:
        share = 100 * result.truncated / total
        log.warning(
            f"{result.truncated} of {total} {role} rows ({share:.1f} %) are longer than training.maxLength"
            f" {encoder.max_length} and were cut",
            truncated=result.truncated,
        )
    if result.dropped:
        log.warning(
            f"{result.dropped} of {total} {role} rows were left out: cut to the prompt, nothing is left to learn",
            dropped=result.dropped,
        )
    if shape == "messages" and role == "training" and not encoder.masks_assistant:
        log.warning(
            "The chat template does not mark what the assistant says ({% generation %}): whole conversations are"
            " learned, what users say too; to learn answers only, use prompt and completion columns"
        )
