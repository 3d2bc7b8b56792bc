"""What is said of a job's rows before training: figures that are right, problems by file and line, what is learned."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.inspection import Inspection, inspect
from finetune_trainer.settings import Environment, Ranks, load
from support.trainer.process import job


def _inspected(folder: Path, model: Path, changes: dict[str, Any], shown: int = 1) -> Inspection:
    settings = load(
        job(folder, model, changes), [], Environment.from_env({"FINETUNE_SCRATCH_DIR": str(folder)}), Ranks()
    )
    return inspect(settings, folder / "work", shown)


def _rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return f"file://{path}"


def test_rows_are_counted_and_shown(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "anna has", "completion": " tea"}] * 3 + [{"prompt": "tea " * 60, "completion": " x"}]
    bad = ['{"prompt": "x"}', '{"prompt": "a", "completion": "\\ud83d"}']
    train = _rows(tmp_path / "rows.jsonl", [*rows, *bad])
    held_out = _rows(tmp_path / "held.jsonl", [rows[0], {"prompt": "bruno has", "completion": " none"}])
    found = _inspected(
        tmp_path, tiny_model, {"dataset.train": train, "dataset.eval": held_out, "training.maxLength": 32}
    )
    learned, held = found.splits
    assert (learned.role, learned.format, learned.rows, learned.bad) == ("train", "prompt-completion", 6, 2)
    assert learned.problems == [
        "spec.dataset.train: rows.jsonl:5: has no column 'completion'; it has 'prompt'",
        "spec.dataset.train: rows.jsonl:6: holds \\ud83d, half of a surrogate pair, which is no character",
    ]
    assert (learned.duplicates, learned.cut, learned.unlearnable, learned.empty) == (2, 1, 1, 0)
    assert learned.percentiles["p100"] > 60
    assert sum(rows for _, _, rows in learned.histogram) == 4
    assert learned.suggestion is not None
    assert learned.suggestion >= learned.percentiles["p100"]
    assert (held.role, held.rows, held.overlap) == ("eval", 2, 1)
    [pieces] = learned.examples
    assert [(piece.text, piece.learned, piece.special) for piece in pieces] == [
        ("<s>", False, True),
        ("anna has", False, False),
        (" tea", True, False),
        ("</s>", True, True),
    ]


def test_figures_are_those_of_the_training(tiny_model: Path, tmp_path: Path) -> None:
    from finetune_trainer.data.dataset import tokenize
    from finetune_trainer.data.row_files import read_rows
    from finetune_trainer.data.tokenizer import load_tokenizer
    from finetune_trainer.inputs import fetch_data_files

    settings = load(
        job(tmp_path, tiny_model, {"dataset.eval": None, "dataset.evalFraction": 0.3, "training.maxLength": 512}),
        [], Environment.from_env({"FINETUNE_SCRATCH_DIR": str(tmp_path)}), Ranks(),
    )  # fmt: skip
    spec = settings.spec
    rows = read_rows(*fetch_data_files(settings), spec.dataset, spec.training.seed)
    trained = tokenize(rows, load_tokenizer(tiny_model, "x"), spec)
    seen: list[tuple[int, int]] = []
    found = inspect(settings, tmp_path / "work", 0, lambda done, total: seen.append((done, total)))
    for split, inspected in zip(trained.splits, found.splits, strict=True):
        assert (inspected.rows, inspected.tokens) == (len(split.input_ids), split.tokens)
        assert inspected.percentiles["p100"] == split.longest
    assert seen[-1][0] == seen[-1][1] > 0


def test_no_rows_are_no_error(tiny_model: Path, tmp_path: Path) -> None:
    found = _inspected(
        tmp_path, tiny_model, {"dataset.train": _rows(tmp_path / "rows.jsonl", []), "dataset.eval": None}
    )
    assert (found.splits[0].rows, found.splits[0].histogram) == (0, [])


@pytest.mark.parametrize("weight", [0.5, 2])
def test_weights_count(weight: float, tiny_model: Path, tmp_path: Path) -> None:
    uri = _rows(tmp_path / "rows.jsonl", [{"text": f"tea {number}"} for number in range(60)])
    sources = [{"uri": uri, "weight": weight}]
    found = _inspected(tmp_path, tiny_model, {"dataset.train": None, "dataset.eval": None, "dataset.sources": sources})
    assert abs(found.splits[0].rows - weight * 60) <= (15 if weight < 1 else 0)
