"""training/answers.jsonl: what the published adapter answered to held-out rows, to read and compare. Pure."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Final

from finetune_trainer.redact import redacted

#: Rows, characters of one text, and bytes of the whole file: an adapter's folder is no copy of the data set.
MAX_ROWS: Final = 200
MAX_CHARACTERS: Final = 4_000
MAX_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class AnsweredRow:
    """One held-out row and what the model answered to it.

    Attributes:
        row: Its number among the held-out rows, from 0.
        prompt: What the model was asked, special tokens included.
        expected: The right answer.
        answer: The model's.
        label: The label read from the model's answer; None without one.
        right: Whether that is the expected answer's label.
    """

    row: int
    prompt: str
    expected: str
    answer: str
    label: str | None
    right: bool


def to_lines(rows: Iterable[AnsweredRow]) -> bytes:
    """Return the file, of MAX_BYTES at most: a JSON object a line, by row, its texts cut and without secrets."""
    lines: list[bytes] = []
    size = 0
    for row in sorted(rows, key=lambda each: each.row)[:MAX_ROWS]:
        shown = {key: _cut(value) if isinstance(value, str) else value for key, value in asdict(row).items()}
        # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes JSON's own escape.
        line = json.dumps(shown, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        size += len(line)
        if size > MAX_BYTES:
            break
        lines.append(line)
    return b"".join(lines)


def _cut(text: str) -> str:
    clean = redacted(text)
    return clean if len(clean) <= MAX_CHARACTERS else f"{clean[: MAX_CHARACTERS - 1]}…"
