"""Labels are read from answers as written, and the scores are the textbook's."""

from typing import Any

import pytest

from finetune_trainer.data import formats
from finetune_trainer.data.row_format import ChatExample
from finetune_trainer.evaluation.nli import (
    Answer,
    first_object,
    read_answer,
    score,
    split_row,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"predicted_label": 1}', Answer(True, "1")),
        ('Sure: {"thought_process": "a {b} c", "predicted_label": 0} and {"predicted_label": 1}', Answer(True, "0")),
        ('{broken {"predicted_label": "1"}', Answer(True, "1")),
        ('{"predicted_label": true}', Answer(True, "1")),
        ('{"predicted_label": [1]}', Answer(True, None)),
        ('{"other": 1}', Answer(True, None)),
        ("no object", Answer(False, None)),
        ('{"predicted_label": 1', Answer(False, None)),
        ("{" * 5000, Answer(False, None)),
        (f'{{"predicted_label": {"1" * 5000}}} {{"predicted_label": 0}}', Answer(True, "0")),
    ],
)
def test_an_answer_is_read(text: str, expected: Answer) -> None:
    assert read_answer(text, "predicted_label") == expected


def test_the_first_complete_object_counts() -> None:
    assert first_object('x {"a": {"b": 1}} {"c": 2}') == {"a": {"b": 1}}


def test_binary_scores_are_those_of_label_1() -> None:
    right = ["1", "1", "1", "0", "0", "0"]
    read = [Answer(True, label) for label in ("1", "1", "0", "1", "0")] + [Answer(False, None)]
    metrics = score(right, read)
    assert metrics["accuracy"] == pytest.approx(3 / 6)
    assert metrics["precision"] == pytest.approx(2 / 3)
    assert metrics["recall"] == pytest.approx(2 / 3)
    assert metrics["f1"] == pytest.approx(2 / 3)
    assert metrics["validJson"] == pytest.approx(5 / 6)
    assert {key: value for key, value in metrics.items() if key.startswith("confusion") and value} == {
        "confusion.0.0": 1, "confusion.0.1": 1, "confusion.0.none": 1, "confusion.1.0": 1, "confusion.1.1": 2,
    }  # fmt: skip


def test_other_label_sets_are_averaged_over_labels() -> None:
    right = ["entailment", "neutral", "contradiction", "neutral"]
    read = [Answer(True, label) for label in ("entailment", "neutral", "neutral", "made up")]
    metrics = score(right, read)
    assert metrics["accuracy"] == 0.5
    assert metrics["precision"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert metrics["recall"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    assert metrics["confusion.neutral.none"] == 1


def test_nothing_right_is_zero_not_an_error() -> None:
    metrics = score(["1", "0"], [Answer(False, None), Answer(False, None)])
    assert (metrics["accuracy"], metrics["precision"], metrics["f1"]) == (0, 0, 0)


def test_rows_of_every_shape_part_into_question_and_answer() -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]

    def split(name: str, row: dict[str, Any], marker: str = "-") -> Any:
        return split_row(formats.named(name).to_example(row), marker)

    assert split("text", {"text": "x [/INST] q [/INST] a"}, "[/INST]") == ("x [/INST] q [/INST]", " a")
    assert split("text", {"text": "q"}, "[/INST]") == "'text' has no answer marker '[/INST]'"
    assert split("prompt-completion", {"prompt": "q", "completion": "a"}) == ("q", "a")
    assert split("prompt-completion", {"prompt": chat[:1], "completion": chat[1:]}) == (ChatExample(chat[:1], 1), "a")
    assert split("messages", {"messages": chat}) == (ChatExample(chat[:1]), "a")
    assert split("messages", {"messages": chat[:1]}) == "the last message is not the assistant's answer"
