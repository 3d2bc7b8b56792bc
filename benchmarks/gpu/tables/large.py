"""Large models and long rows: what hardly fits one card of 80 GiB, and adapters on every linear layer."""

from pathlib import Path

from runs import build, limited, show, train, write_rows

CARD = 80


def long_rows(folder: Path) -> None:
    """Four steps of two rows of 12,800 to 32,768 tokens."""
    build("llama-3.1-8b")
    write_rows(folder / "train.jsonl", 64, 32_768)
    settings = ["training.maxLength=32768", "training.batchSize=2"]
    show([train(folder, "rows of up to 32,768 tokens, 80 GiB", settings, 4, 1, script=limited(CARD))])


def all_linear(folder: Path) -> None:
    """Ten steps of 8 rows of 1,600 to 4,096 tokens, with adapters on every linear layer."""
    build("llama-3.1-8b")
    write_rows(folder / "train.jsonl", 400, 4096)
    settings = [
        "training.maxLength=4096",
        "training.batchSize=8",
        "lora.targetModules=[all-linear]",
        "lora.dropout=0.1",
    ]
    show([train(folder, "adapters on every linear layer, rows of up to 4,096 tokens", settings, 10, 1)])


def seventy(folder: Path) -> None:
    """Ten steps of 16 rows of 325 tokens on average."""
    build("llama-3-70b")
    show([train(folder, "70 B weights, 80 GiB", [], 10, 1, script=limited(CARD))])
