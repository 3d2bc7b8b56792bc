"""Checked rows -> token ids with labels. Torch-free, as all that is done before torch is imported."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.encoding import IGNORE, EncodedRow, Encoder, LastProblem, RowProblem
from finetune_trainer.data.ragged import TokenLists
from finetune_trainer.data.row_files import RowSplits
from finetune_trainer.data.row_format import ChatExample, RowFormat
from finetune_trainer.data.rows import Row, refuse_bad_rows
from finetune_trainer.errors import DatasetInvalid

if TYPE_CHECKING:
    from datasets import Dataset

log = structlog.get_logger(__name__)
_BATCH: Final = 1000
_FIELDS: Final = {"training": "spec.dataset.train", "evaluation": "spec.dataset.eval"}


@dataclass
class TokenizedDataset:
    """Token ids and labels (IGNORE where no loss is taken) of all rows.

    Attributes:
        truncated: Rows that were longer than training.maxLength.
        dropped: Rows left out because truncation left no token to learn.
        empty: Rows left out because the tokenizer makes no token of what is to be learned.
        missed_turns: Turns of the assistant that are not learned, for nothing tells them from the rest.
    """

    input_ids: TokenLists = field(default_factory=TokenLists)
    labels: TokenLists = field(default_factory=TokenLists)
    truncated: int = 0
    dropped: int = 0
    empty: int = 0
    missed_turns: int = 0

    @property
    def tokens(self) -> int:
        """Tokens of all rows together."""
        return self.input_ids.tokens

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.input_ids.longest

    def add(self, row: EncodedRow) -> None:
        """Add a row, or count why it is left out."""
        self.truncated += row.truncated
        self.missed_turns += row.missed_turns
        if any(label != IGNORE for label in row.labels[1:]):
            self.input_ids.append(row.input_ids)
            self.labels.append(row.labels)
        elif row.truncated:
            self.dropped += 1
        else:
            self.empty += 1

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


def tokenize(rows: RowSplits, tokenizer: Any, spec: FineTuneJobSpec) -> Datasets:
    """Tokenize both splits, truncated at training.maxLength.

    Raises:
        DatasetInvalid: A row does not fit the chat template, or a split has no token to learn from.
    """
    encoder = Encoder(tokenizer, spec.training.max_length, spec.dataset.loss == "all")
    train = encode(rows.train, rows.train.format, encoder, "training")
    held_out = encode(rows.eval, rows.eval.format, encoder, "evaluation") if rows.eval else None
    return Datasets(train, held_out, encoder)


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
    result, bad, ends = TokenizedDataset(), [], EndOfTurn(encoder)
    for batch in _batches(rows):
        bad += [row for row in batch if row.problem]  # only when a file has changed since it was checked
        good = [row for row in batch if not row.problem]
        examples = [row_format.to_example(row.data) for row in good]
        for row, example, encoded in zip(good, examples, encoder.encode(examples), strict=True):
            if isinstance(encoded, RowProblem):
                bad.append(row.refuse(str(encoded)))
                if isinstance(encoded, LastProblem):
                    refuse_bad_rows(bad)
                continue
            result.add(encoded)
            if isinstance(example, ChatExample):
                ends.see(encoded)
    refuse_bad_rows(bad)
    _log(result, len(rows), row_format.name, encoder, role)
    if role == "training":
        for note in [*encoder.template.notes, *ends.notes()]:
            log.warning(note)
    if not result.input_ids:
        raise DatasetInvalid(f"{_FIELDS[role]}: {_nothing(result, encoder, role)}")
    return result


class EndOfTurn:
    """Watches whether the answers of conversations end in the token at which the model stops."""

    def __init__(self, encoder: Encoder) -> None:
        self._tokenizer = encoder.tokenizer
        self._seen = self._ended = 0

    def see(self, row: EncodedRow) -> None:
        """Look at a conversation."""
        if not row.truncated:
            self._seen += 1
            self._ended += self._tokenizer.eos_token_id in row.labels

    def notes(self) -> list[str]:
        """Return what the user should know."""
        if not self._seen or self._ended:
            return []
        token = self._tokenizer.eos_token
        return [
            f"Chat template never writes {token}, the tokenizer's end-of-sequence token, where the assistant speaks:"
            " the model does not learn to stop"
        ]


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    rest = iter(rows)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _nothing(result: TokenizedDataset, encoder: Encoder, role: str) -> str:
    if result.empty and not result.dropped:
        return f"the tokenizer makes no token of what is to be learned of any {role} row"
    return f"no {role} row has a token left to learn from after truncation at training.maxLength {encoder.max_length}"


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
    if result.empty:
        log.warning(
            f"{result.empty} of {total} {role} rows dropped: the tokenizer makes no token of what is to be learned",
            empty=result.empty,
        )
    if result.missed_turns:
        log.warning(
            f"{result.missed_turns} turns of the assistant in {role} rows are not learned: the chat template writes"
            " them differently once a turn follows",
            missed_turns=result.missed_turns,
        )
