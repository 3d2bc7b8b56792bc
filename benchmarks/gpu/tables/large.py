"""What hardly fits one card of 80 GiB: rows of 32,768 tokens, and layers of a model of 70 billion weights."""

from pathlib import Path

from runs import build, limited, show, train, write_rows

CARD = 80


def long_rows(folder: Path) -> None:
    """Four steps of two rows of 12,800 to 32,768 tokens."""
    build("llama-3.1-8b")
    write_rows(folder / "train.jsonl", 64, 32_768)
    settings = ["training.maxLength=32768", "training.batchSize=2"]
    show([train(folder, "rows of up to 32,768 tokens, 80 GiB", settings, 4, 1, script=limited(CARD))])


def seventy(folder: Path) -> None:
    """Twenty steps with a tenth of Llama-3-70B's layers, each of full size: a step of all takes ten times as long."""
    build("llama-3-70b-tenth")
    show([train(folder, "8 layers of 80, 80 GiB", [], 20, 2, script=limited(CARD))])
