"""The bar of a run fits the terminal: columns go by width, the time left last."""

import io

import pytest
from rich.console import Console
from rich.progress import Progress

from finetune_api.status import Progress as Reported
from finetune_api.status import TrainerReport
from finetune_trainer.reporting.progress_bar import _columns, _numbers

REPORT = TrainerReport(progress=Reported(loss=1.25, eval_loss=1.5, tokens_per_second=1234))


def drawn(width: int, done: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    clock = iter(range(1000))
    bar = Progress(*_columns(width), console=console, get_time=lambda: float(next(clock)))
    task = bar.add_task("Training", total=100, step="step 30/100", numbers="  ".join(_numbers(REPORT, width)))
    for step in range(done + 1):
        bar.update(task, completed=step)
    with console.capture() as capture:
        console.print(bar.get_renderable())
    return capture.get()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_one_line_within_the_terminal_that_ends_in_the_time_left(width: int) -> None:
    [line] = drawn(width, 30).splitlines()
    assert len(line) <= width
    assert line.startswith("Training") and "step 30/100" in line and "ETA " in line
    assert ("loss 1.2500" in line, "tokens/s" in line) == (width >= 60, width >= 100)


def test_no_empty_eta() -> None:
    assert "ETA" not in drawn(80, 0)
