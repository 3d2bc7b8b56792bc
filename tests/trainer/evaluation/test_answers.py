"""training/answers.jsonl: bounded, one line a row, in order, and without a secret."""

import json
from dataclasses import replace

import pytest

from finetune_trainer import redact
from finetune_trainer.evaluation.answers import MAX_BYTES, MAX_CHARACTERS, MAX_ROWS, AnsweredRow, to_lines

ROW = AnsweredRow(0, "Is it so?", '{"label": 1}', '{"label": 0}', "0", False)


def test_rows_are_lines_in_their_order() -> None:
    rows = [replace(ROW, row=number) for number in (2, 0, 1)]
    assert [json.loads(line)["row"] for line in to_lines(rows).splitlines()] == [0, 1, 2]
    assert json.loads(to_lines([ROW])) == {
        "row": 0, "prompt": "Is it so?", "expected": '{"label": 1}', "answer": '{"label": 0}', "label": "0",
        "right": False,
    }  # fmt: skip


def test_rows_texts_and_bytes_are_bounded() -> None:
    long = replace(ROW, prompt="ä" * 9_000, answer="\\" * 5000, label="x" * 9000)
    data = to_lines([replace(long, row=number) for number in range(MAX_ROWS + 50)])
    rows = [json.loads(line) for line in data.splitlines()]
    assert len(data) <= MAX_BYTES and 10 < len(rows) <= MAX_ROWS
    assert {len(rows[0][key]) for key in ("prompt", "answer", "label")} == {MAX_CHARACTERS}
    assert len(to_lines([replace(ROW, row=number) for number in range(500)]).splitlines()) == MAX_ROWS


@pytest.mark.parametrize("text", ["\ud800 alone", "a\nb\u2028c\u0085d", "\x00\x1b]0;title\x07"])
def test_any_text_is_one_line_of_json_and_comes_back(text: str) -> None:
    data = to_lines([replace(ROW, prompt=text)])
    assert data.count(b"\n") == 1
    assert json.loads(data)["prompt"] == text


def test_no_secret_is_published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redact, "_forms", set())
    redact.remember("hf_AbCdEfGhIjKl")
    row = replace(ROW, prompt="hf_AbCdEfGhIjKl", expected="https://me:hunter22@host/", answer="Bearer abcdef0123456789")
    data = to_lines([row]).decode()
    assert not any(secret in data for secret in ("hf_AbC", "hunter22", "abcdef0123"))
