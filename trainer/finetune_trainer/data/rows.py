"""A row of a data file, with its location and its problem."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from finetune_trainer.errors import DatasetInvalid

#: How many bad rows are shown before the rest is only counted.
SHOWN_PROBLEMS = 10
#: Characters of a problem that are shown.
_LONGEST: Final = 1000


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
        # It may quote the row, which may be very long.
        problem = self.problem if len(self.problem) <= _LONGEST else f"{self.problem[:_LONGEST]}…"
        return f"{self.file}:{self.line}: {problem}"


def refuse_bad_rows(rows: Iterable[Row]) -> None:
    """Raise DatasetInvalid with the first problems among `rows`, one per line; do nothing if there is none."""
    shown: list[str] = []
    more = 0  # only counted: a few compressed bytes may be very many bad rows
    for row in rows:
        if row.problem and len(shown) < SHOWN_PROBLEMS:
            shown.append(str(row))
        elif row.problem:
            more += 1
    if not shown:
        return
    raise DatasetInvalid("\n".join(shown) + (f"\n… and {more} more bad rows" if more else ""))


def half_character(text: str) -> str:
    """Return what is wrong with a text that holds half of a surrogate pair, or ''. No tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds \\u{ord(text[error.start]):04x}, half of a surrogate pair, which is no character"
    return ""
