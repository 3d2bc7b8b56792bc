"""Natural-language-inference metrics: labels read from generated answers. Pure.

An answer is text with a JSON object in it (chain of thought and label); its first object counts.
"""

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune_trainer.data.row_format import ChatExample, CompletionExample, Example, TextExample

Label = Hashable
#: Largest label set, and longest label in it, whose confusion matrix goes into the flat metrics.
_CONFUSION_LABELS = 4
_LABEL_LENGTH = 64


@dataclass(frozen=True)
class Answer:
    """What was read from one answer.

    Attributes:
        valid_json: Whether it holds a JSON object.
        label: The label in that, None without a usable one.
    """

    valid_json: bool
    label: Label | None


def first_object(text: str) -> dict[str, Any] | None:
    """Return the first complete JSON object in `text`, None without one."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, _ = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):  # also for a number of too many digits
            start = text.find("{", start + 1)
            continue
        return value if isinstance(value, dict) else None
    return None


def read_answer(text: str, label_key: str) -> Answer:
    """Read the label from an answer. Labels are compared as text, so 1 and "1" are the same."""
    found = first_object(text)
    if found is None:
        return Answer(False, None)
    value = found.get(label_key)
    if isinstance(value, bool):
        value = int(value)
    return Answer(True, str(value) if isinstance(value, str | int | float) else None)


def split_row(example: Example, marker: str) -> tuple[str | ChatExample, str] | str:
    """Split an example into its prompt (a text, or a conversation without the answer) and the right answer.

    Args:
        example: A held-out row.
        marker: What the answer of a plain text follows; its last occurrence counts.

    Returns:
        Prompt and answer, or a string that says why the row has none.
    """
    if isinstance(example, TextExample):
        prompt, found, answer = example.text.rpartition(marker)
        return (prompt + found, answer) if found else f"{example.column!r} has no answer marker {marker!r}"
    if isinstance(example, CompletionExample):
        return example.prompt, example.completion
    last = example.messages[-1]
    if last["role"] != "assistant" or not isinstance(last.get("content"), str):
        return "the last message is not the assistant's answer"
    return replace(example, messages=example.messages[:-1]), last["content"]


def confusion(right: Sequence[Label], answers: Sequence[Answer]) -> dict[tuple[str, str], int]:
    """Count the pairs (right label, label read); "none" stands for an answer without a label of the set."""
    known = set(right)
    counts: dict[tuple[str, str], int] = {}
    for label, answer in zip(right, answers, strict=True):
        read = str(answer.label) if answer.label in known else "none"
        counts[str(label), read] = counts.get((str(label), read), 0) + 1
    return counts


def score(right: Sequence[Label], answers: Sequence[Answer]) -> dict[str, float]:
    """Return accuracy, precision, recall, F1, validJson (0 to 1), and counts as `confusion.<right>.<read>`.

    Labels 0 and 1: precision, recall and F1 are those of label 1. Any other label set: their unweighted means over
    the labels (macro average). An answer without a usable label is wrong.
    """
    labels = sorted({str(label) for label in right})
    counts = confusion(right, answers)
    positive = ["1"] if set(labels) <= {"0", "1"} else labels
    per_label = [_precision_recall_f1(label, counts) for label in positive]
    precision, recall, f1 = (sum(values) / len(per_label) for values in zip(*per_label, strict=True))
    metrics = {
        "accuracy": sum(counts.get((label, label), 0) for label in labels) / len(right),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "validJson": sum(answer.valid_json for answer in answers) / len(answers),
    }
    if len(labels) <= _CONFUSION_LABELS and all(len(label) <= _LABEL_LENGTH for label in labels):
        metrics |= {
            f"confusion.{label}.{read}": float(counts.get((label, read), 0))
            for label in labels
            for read in [*labels, "none"]
        }
    return metrics


def _precision_recall_f1(label: str, counts: dict[tuple[str, str], int]) -> tuple[float, float, float]:
    hits = counts.get((label, label), 0)
    said = sum(count for (_, read), count in counts.items() if read == label)
    real = sum(count for (right, _), count in counts.items() if right == label)
    precision, recall = hits / said if said else 0.0, hits / real if real else 0.0
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0
