"""A training method is one file: the page on how to add one trains a model."""

from pathlib import Path

from finetune_trainer.methods import METHODS
from support.docs.markdown import ROOT, blocks
from support.trainer.process import TrainerProcess, job, metrics_lines, train


def test_methods_are_found_by_their_names() -> None:
    assert {name: method.name for name, method in METHODS.items()} == {"sft": "sft"}


def test_the_page_on_methods_trains_with_noise_and_evaluates_without(tiny_model: Path, tmp_path: Path) -> None:
    [source] = blocks(ROOT / "docs" / "extending" / "method.md", "python")

    def inject() -> None:
        names: dict[str, type] = {}
        exec(source, names)
        METHODS["sft"] = names["Neftune"]()

    changes = {"training.maxSteps": 3, "lora.dropout": 0.0}
    plain = train(job(tmp_path / "plain", tiny_model, changes), tmp_path / "plain")
    noisy = TrainerProcess(job(tmp_path, tiny_model, changes), tmp_path, before=inject).finish()
    assert (plain.exit_code, noisy.exit_code) == (0, 0), noisy.log
    before, after = metrics_lines(tmp_path / "plain/out"), metrics_lines(tmp_path / "out")
    assert after[0] == before[0], "the base model is measured without noise"
    assert after[1]["loss"] != before[1]["loss"]
