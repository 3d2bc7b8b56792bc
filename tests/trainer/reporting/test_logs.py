"""--log decides the form of the log, on a terminal or piped; without it the place decides."""

import json

import pytest
import structlog
from rich.console import Console

from finetune_trainer.cli import parser
from finetune_trainer.reporting import logs

EVENT = "Adapter attached: 32,768 trainable parameters"


def said(capsys: pytest.CaptureFixture[str]) -> str:
    structlog.get_logger("test").info(EVENT, rank=16)
    return capsys.readouterr().err.strip()


@pytest.mark.parametrize("arguments", [[], ["--log", "json"], ["--log", "json", "-v"]])
def test_json_lines_where_nobody_reads_along(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = parser().parse_args(["--config", "job.yaml", *arguments])
    logs.configure(None, options.log, details=options.verbose)
    entry = json.loads(said(capsys))
    assert (entry["event"], entry["rank"]) == (EVENT, 16)


@pytest.mark.parametrize(("arguments", "end"), [([], EVENT), (["-v"], f"{EVENT}  rank=16")])
def test_text_in_a_pipe(arguments: list[str], end: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = parser().parse_args(["--config", "job.yaml", "--log", "text", *arguments])
    logs.configure(None, options.log, details=options.verbose)
    assert said(capsys).partition("  ")[2] == end


def test_text_above_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(Console(stderr=True, width=40))
    assert said(capsys).endswith(EVENT)
