"""A row of a data file, with its place and its problem."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_trainer.errors import DatasetInvalid

#: How many bad rows are shown before the rest is only counted.
SHOWN_PROBLEMS = 10


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


def refuse_bad_rows(rows: Iterable[Row]) -> None:
    """Raise DatasetInvalid with the first problems among `rows`, one a line; do nothing when there is none."""
    bad = [row for row in rows if row.problem]
    if not bad:
        return
    shown = [str(row) for row in bad[:SHOWN_PROBLEMS]]
    more = len(bad) - len(shown)
    raise DatasetInvalid("\n".join(shown) + (f"\n… and {more} more bad rows" if more else ""))
