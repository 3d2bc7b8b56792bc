"""The table: what differs and nothing else, in forms that no program takes for more than text."""

import csv
import io
from dataclasses import replace

import pytest

from finetune_cli.comparison import table
from finetune_cli.comparison.runs import Run, differing, shared, values_of

SPEC = {
    "model": {"source": "hf://a/b"},
    "dataset": {"train": "s3://data/train.jsonl"},
    "output": {"uri": "s3://adapters/x"},
}
RUN = Run("a", "s3://x/a", "Succeeded", values_of(SPEC), {"evalLoss": 0.5, "evalLossBefore": 2.0}, None)


def test_only_what_differs_is_a_column_defaults_included() -> None:
    other = replace(
        RUN, name="b", values=values_of(SPEC | {"lora": {"rank": 32}, "output": {"uri": "s3://adapters/y"}})
    )
    titles, body = table.rows([RUN, other])
    assert titles == ["Run", "rank", "Held-out loss", "Time"]
    assert [cells[:3] for cells in body] == [["a", "16", "2.0000 → 0.5000"], ["b", "32", "2.0000 → 0.5000"]]
    assert shared([RUN, other])["lora.alpha"] == "32"


def test_names_that_end_alike_are_told_apart() -> None:
    one = replace(RUN, values={"a.seed": "1", "b.seed": "1", "c.rank": "1"})
    other = replace(RUN, name="b", values={"a.seed": "2", "b.seed": "2", "c.rank": "2"})
    assert table.rows([one, other])[0][1:4] == ["a.seed", "b.seed", "rank"]


def test_a_run_that_failed_has_its_phase_and_no_value() -> None:
    failed = Run("b", "", "Failed", RUN.values, {}, None)
    titles, body = table.rows([RUN, failed])
    assert titles[1] == "Phase"
    assert body[1][1:3] == ["Failed", ""]


@pytest.mark.parametrize("text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1"])
def test_no_cell_of_csv_is_a_formula(text: str) -> None:
    hostile = Run(text, text, text, {text: text}, {}, None)
    lines = list(csv.reader(io.StringIO(table.as_csv([hostile, RUN]))))
    assert all(not cell.startswith(("=", "+", "@", "\t")) for line in lines for cell in line)
    assert all(not cell.startswith("-") for line in lines for cell in line)


def test_a_small_number_stays_a_number_in_csv() -> None:
    runs = [replace(RUN, values={"training.learningRate": "-1e-05"}), RUN]
    assert ",-1e-05," in table.as_csv(runs)


def test_markdown_keeps_its_columns_and_runs_no_markup() -> None:
    hostile = replace(RUN, name="a|b` <img src=x> [x](http://evil) *b*", values={"x": "1"})
    lines = table.as_markdown([hostile, replace(RUN, values={"x": "2"})]).splitlines()
    assert {line.replace("\\|", "").count("|") for line in lines} == {5}
    assert "<img" not in lines[2] and "[x]" not in lines[2]


def test_a_spec_of_another_version_is_compared_as_it_is_and_no_further() -> None:
    deep: dict[str, object] = {"x": 1}
    for _ in range(50):
        deep = {"k": deep}
    found = values_of({"new": {"field": 1, "list": ["a", "b"]}, "deep": deep, "many": {str(n): n for n in range(9999)}})
    assert found["new.field"] == "1" and found["new.list"] == "a, b"
    assert len(found) <= 400 and all(len(value) <= 200 for value in found.values())
    assert differing([RUN, replace(RUN, values=found)])
