"""What a job's rows are, before any GPU: formats, lengths in tokens, doubles, bad rows, and what is learned of them."""

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Final

from finetune_trainer.data.encoding import IGNORE, EncodedRow, Encoder, RowProblem
from finetune_trainer.data.row_files import DataFile, Rows, unchecked_splits
from finetune_trainer.data.rows import SHOWN_PROBLEMS, Row
from finetune_trainer.data.tokenizer import add_tokens, load_tokenizer
from finetune_trainer.inputs import fetch_data_files, fetch_model_metadata
from finetune_trainer.settings import Settings

_BATCH: Final = 500
_NO_LIMIT: Final = 2**31
_BARS: Final = 12
_PERCENTILES: Final = (50, 90, 95, 99, 100)
#: Lengths to suggest, and the share of rows that a suggestion may cut.
_STEP: Final = 64
_CUT: Final = 0.005


@dataclass(frozen=True)
class Piece:
    """A stretch of a row's text: whether it is learned, and whether it is a special token."""

    text: str
    learned: bool
    special: bool = False


@dataclass
class SplitReport:
    """What the rows of one split are.

    Attributes:
        role: train or eval.
        format: How the rows were read.
        rows: Rows in all, bad ones too.
        bad: Rows that cannot be used; `problems` holds the first of them, with file and line.
        tokens: Of all rows, uncut; `learned` of them carry loss.
        duplicates: Rows whose tokens an earlier row of the split has.
        overlap: Rows of the evaluation that are among the training rows.
        empty: Rows of which nothing is learned, however long they may be.
        cut: Rows longer than training.maxLength; of `unlearnable` nothing is learned once they are cut.
        missed_turns: Turns of the assistant that nothing tells from the rest.
        percentiles: Length in tokens below which so many of a hundred rows lie.
        histogram: First and last length of a bar, and its rows.
        suggestion: A training.maxLength that cuts at most one row of 200; None where that is so already.
        examples: The first rows, piece by piece.
    """

    role: str
    format: str
    rows: int = 0
    bad: int = 0
    problems: list[str] = field(default_factory=list)
    tokens: int = 0
    learned: int = 0
    duplicates: int = 0
    overlap: int = 0
    empty: int = 0
    cut: int = 0
    unlearnable: int = 0
    missed_turns: int = 0
    percentiles: dict[str, int] = field(default_factory=dict)
    histogram: list[tuple[int, int, int]] = field(default_factory=list)
    suggestion: int | None = None
    examples: list[list[Piece]] = field(default_factory=list)


@dataclass(frozen=True)
class Inspection:
    """Both splits, the limit that rows are cut at, and what the user should know of the chat template."""

    max_length: int
    splits: list[SplitReport]
    notes: list[str]


def inspect(
    settings: Settings, work: Path, shown: int, on_progress: Callable[[int, int], None] | None = None
) -> Inspection:
    """Read all rows of a job, tokenize them as training would, and say what they are.

    Args:
        settings: The job.
        work: A folder of this process.
        shown: Rows to return as examples.
        on_progress: Told of bytes read, and of bytes in all.

    Raises:
        TrainerError: A source is missing or denied, there is no usable tokenizer, or the format is not clear.
    """
    spec = settings.spec
    model = fetch_model_metadata(settings, work)
    train, held_out = fetch_data_files(settings)
    meter = _Meter([*train, *held_out], passes=2 if spec.dataset.eval_fraction else 1)
    tokenizer = load_tokenizer(model.folder, spec.model.source, spec.model.trust_remote_code)
    add_tokens(tokenizer, spec.dataset.add_tokens or ())
    encoder = Encoder(tokenizer, _NO_LIMIT, spec.dataset.loss == "all")
    rows = unchecked_splits(
        [meter.watch(file) for file in train],
        [meter.watch(file) for file in held_out],
        spec.dataset,
        spec.training.seed,
    )
    meter.restart()  # the format is told from a first look
    seen: set[int] = set()
    reports = []
    for role, part in (("train", rows.train), ("eval", rows.eval)):
        if part is not None:
            counter = _Counter(SplitReport(role, part.format.name), encoder, spec.training.max_length, shown)
            reports.append(counter.count(part, seen, lambda: on_progress and on_progress(meter.done, meter.total)))
    return Inspection(spec.training.max_length, reports, [*encoder.template.notes])


class _Meter:
    """Counts the bytes read of data files."""

    def __init__(self, files: Sequence[DataFile], passes: int) -> None:
        self.total = passes * sum(file.path.stat().st_size for file in files)
        self.restart()

    def restart(self) -> None:
        """Forget what was read so far."""
        self._finished = self._size = 0
        self._open: BinaryIO | None = None

    def watch(self, file: DataFile) -> DataFile:
        """Return the same file, whose reading is counted."""

        def opened(path: Path) -> BinaryIO:
            self._finished += self._size
            self._open, self._size = file.open_file(path), path.stat().st_size
            return self._open

        return replace(file, open_file=opened)

    @property
    def done(self) -> int:
        """Bytes read so far."""
        reading = self._open is not None and not self._open.closed
        return self._finished + (self._open.tell() if self._open and reading else self._size)


class _Counter:
    """Counts the rows of one split."""

    def __init__(self, report: SplitReport, encoder: Encoder, max_length: int, shown: int) -> None:
        self._report = report
        self._encoder = encoder
        self._max_length = max_length
        self._shown = shown
        self._lengths = array("i")

    def count(self, rows: Rows, seen: set[int], tell: Callable[[], object]) -> SplitReport:
        """Return the finished report. `seen` holds the digests of training rows."""
        report, own = self._report, seen if self._report.role == "train" else set()
        for batch in _batches(rows):
            good = [row for row in batch if not row.problem]
            for row in batch:
                if row.problem:
                    self._refuse(row)
            examples = [rows.format.to_example(row.data) for row in good]
            for row, encoded in zip(good, self._encoder.encode(examples), strict=True):
                if isinstance(encoded, RowProblem):
                    self._refuse(row.refuse(str(encoded)))
                    continue
                digest = _digest(encoded.input_ids)
                report.duplicates += digest in own
                report.overlap += own is not seen and digest in seen
                own.add(digest)
                self._add(encoded)
            report.rows += len(batch)
            tell()
        self._finish()
        return report

    def _refuse(self, row: Row) -> None:
        self._report.bad += 1
        if len(self._report.problems) < SHOWN_PROBLEMS:
            self._report.problems.append(str(row))

    def _add(self, row: EncodedRow) -> None:
        report, length = self._report, len(row.input_ids)
        self._lengths.append(length)
        learned = length - row.labels.count(IGNORE)
        report.tokens += length
        report.learned += learned
        report.missed_turns += row.missed_turns
        report.cut += length > self._max_length
        # The first token of a row is predicted from nothing.
        if not learned or (learned == 1 and row.labels[0] != IGNORE):
            report.empty += 1
        elif length > self._max_length and set(row.labels[1 : self._max_length]) <= {IGNORE}:
            report.unlearnable += 1
        if len(report.examples) < self._shown:
            report.examples.append(_pieces(self._encoder.tokenizer, row))

    def _finish(self) -> None:
        lengths = sorted(self._lengths)
        if not lengths:
            return
        report, last = self._report, len(lengths) - 1
        report.percentiles = {f"p{share}": lengths[round(last * share / 100)] for share in _PERCENTILES}
        width = max(1, -(-(lengths[-1] + 1) // _BARS))
        counts = [0] * -(-(lengths[-1] + 1) // width)
        for length in lengths:
            counts[length // width] += 1
        report.histogram = [(index * width, (index + 1) * width - 1, rows) for index, rows in enumerate(counts)]
        if report.cut > _CUT * len(lengths):
            enough = lengths[round(last * (1 - _CUT))]
            report.suggestion = -(-enough // _STEP) * _STEP


def _batches(rows: Rows) -> Iterator[list[Row]]:
    rest = iter(rows)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _digest(ids: Sequence[int]) -> int:
    return int.from_bytes(hashlib.blake2b(array("i", ids).tobytes(), digest_size=8).digest())


def _pieces(tokenizer: Any, row: EncodedRow) -> list[Piece]:
    """Return the row's text in stretches of one kind."""
    special = set(tokenizer.all_special_ids)
    pieces, ids = [], []
    kinds = [(label != IGNORE, token in special) for token, label in zip(row.input_ids, row.labels, strict=True)]
    for index, (token, kind) in enumerate(zip(row.input_ids, kinds, strict=True)):
        ids.append(token)
        if index + 1 == len(kinds) or kinds[index + 1] != kind or kind[1]:
            pieces.append(Piece(tokenizer.decode(ids), *kind))
            ids = []
    return pieces
