"""Data files -> checked rows -> token ids with labels. Every row is looked at before any weight is loaded."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from finetune_trainer import formats
from finetune_trainer.errors import DatasetInvalid
from finetune_trainer.formats import Format, Row
from finetune_trainer.tokens import Encoder, RowProblem

if TYPE_CHECKING:
    from datasets import Dataset

log = structlog.get_logger(__name__)
_BATCH = 1000


@dataclass(frozen=True)
class Shard:
    """One data file: where it lies here, and its name for messages."""

    path: Path
    name: str


@dataclass
class Encoded:
    """A tokenized set of rows: ids and labels (-100 where no loss is taken), and what was done to them."""

    input_ids: list[list[int]] = field(default_factory=list)
    labels: list[list[int]] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0

    @property
    def tokens(self) -> int:
        return sum(map(len, self.input_ids))

    @property
    def longest(self) -> int:
        return max(map(len, self.input_ids), default=0)

    def dataset(self) -> "Dataset":
        """For TRL: columns input_ids and labels."""
        from datasets import Dataset, Features, Sequence, Value

        numbers = Sequence(Value("int32"))
        return Dataset.from_dict(
            {"input_ids": self.input_ids, "labels": self.labels},
            features=Features({"input_ids": numbers, "labels": numbers}),
        )


def load_rows(shards: Sequence[Shard], wanted: str, text_field: str) -> tuple[list[Row], Format]:
    """Read and check every row of `shards`. `wanted` is dataset.format.

    Raises DatasetInvalid: with the first bad rows, each with file and line, or when there is no row at all.
    """
    stream: Iterator[Row] = chain.from_iterable(formats.read(shard.path, shard.name) for shard in shards)
    names = ", ".join(shard.name for shard in shards[:3]) + (" …" if len(shards) > 3 else "")
    head = list(islice(stream, _BATCH))
    shape = _shape(head, wanted, text_field)
    rows = [formats.check(row, shape, text_field) for row in chain(head, stream)]
    refuse_bad_rows(rows)
    if not rows:
        raise DatasetInvalid(f"{names}: has no rows")
    return rows, shape


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


def refuse_bad_rows(rows: Iterable[Row]) -> None:
    """Raise DatasetInvalid with the first problems among `rows`, one a line; do nothing when there is none."""
    bad = [row for row in rows if row.problem]
    if not bad:
        return
    shown = [str(row) for row in bad[: formats.SHOWN_PROBLEMS]]
    more = len(bad) - len(shown)
    raise DatasetInvalid("\n".join(shown) + (f"\n… and {more} more bad rows" if more else ""))


def encode(rows: Sequence[Row], shape: Format, encoder: Encoder, role: str) -> Encoded:
    """Tokenize `rows`, cut them at the encoder's maximum, and leave out those without a token to learn from.

    `role` ("training" or "evaluation") is for the log. Raises DatasetInvalid, with file and line.
    """
    result, bad = Encoded(), []
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        for row, encoded in zip(batch, encoder.encode([row.data for row in batch], shape), strict=True):
            if isinstance(encoded, RowProblem):
                bad.append(row.refuse(str(encoded)))
                continue
            result.truncated += encoded.truncated
            if all(label == -100 for label in encoded.labels[1:]):
                result.dropped += 1
                continue
            result.input_ids.append(encoded.input_ids)
            result.labels.append(encoded.labels)
    refuse_bad_rows(bad)
    _log(result, len(rows), shape, encoder.max_length, role)
    if not result.input_ids:
        raise DatasetInvalid(
            f"no {role} row has a token left to learn from after cutting at training.maxLength {encoder.max_length}"
        )
    return result


def _log(result: Encoded, total: int, shape: str, max_length: int, role: str) -> None:
    figures: dict[str, Any] = {"format": shape, "rows": total, "tokens": result.tokens, "longest": result.longest}
    log.info(f"{role.capitalize()} rows are {shape}: {total} rows, {result.tokens:,} tokens", **figures)
    if result.truncated:
        share = 100 * result.truncated / total
        log.warning(
            f"{result.truncated} of {total} {role} rows ({share:.1f} %) are longer than training.maxLength"
            f" {max_length} and were cut",
            truncated=result.truncated,
        )
    if result.dropped:
        log.warning(
            f"{result.dropped} of {total} {role} rows were left out: cut to the prompt, nothing is left to learn",
            dropped=result.dropped,
        )
