"""A row of a data file, with its location and its problem."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from finetune_trainer.errors import DatasetInvalid

#: How many bad rows are shown before the rest is only counted.
SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        file: The file's name in messages.
        line: Counts from 1 (Parquet: the row's number).
        data: The parsed row; None if it has a problem.
        problem: What is wrong with it, or ''.
    """

    file: str
    line: int
    data: Any
    problem: str = ""

    def refuse(self, problem: str) -> "Row":
        """Return the row with its problem instead of its data."""
        return Row(self.file, self.line, None, problem)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.problem}"


def refuse_bad_rows(rows: Iterable[Row]) -> None:
    """Raise DatasetInvalid with the first problems among `rows`, one per line; do nothing if there is none."""
    bad = [row for row in rows if row.problem]
    if not bad:
        return
    shown = [str(row) for row in bad[:SHOWN_PROBLEMS]]
    more = len(bad) - len(shown)
    raise DatasetInvalid("\n".join(shown) + (f"\n… and {more} more bad rows" if more else ""))
