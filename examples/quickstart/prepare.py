"""Make what the quickstart's job reads: build/train.jsonl, build/eval.jsonl and build/model.

A build that is whole and current is left alone; `--force` makes it anew.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Final

# On shared cores, threads that wait must not spin. Has to be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import nli
import prose

try:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
except ModuleNotFoundError:
    sys.exit("The trainer is not installed in this Python: run `make quickstart`, or `pip install -e '.[trainer]'`")

HERE: Final = Path(__file__).resolve().parent
BUILD: Final = HERE / "build"
TRAIN_ROWS: Final = 1200
EVAL_ROWS: Final = 240
DOCUMENTS: Final = 51_000
TOKENIZER_DOCUMENTS: Final = 6_000
SEED: Final = 0
_SOURCES: Final = ("world.py", "arguments.py", "nli.py", "prose.py", "base_model.py", "prepare.py")
_LIBRARIES: Final = ("torch", "transformers", "tokenizers")
_STAMP: Final = "build.json"
_THREADS: Final = 4  # more do not help matrices this small


def recipe() -> str:
    """A digest of all that the build follows from: these files and the libraries' versions."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((HERE / name).read_bytes())
    try:
        digest.update(" ".join(f"{name} {version(name)}" for name in _LIBRARIES).encode())
    except PackageNotFoundError as missing:
        sys.exit(
            f"{missing.name} is not installed in this Python: run `make quickstart`, or `pip install -e '.[trainer]'`"
        )
    return digest.hexdigest()


def is_current(folder: Path) -> bool:
    """Whether `folder` holds a whole build of this recipe."""
    try:
        stamp = json.loads((folder / _STAMP).read_text())
        return stamp["recipe"] == recipe() and stamp["files"] == _digests(folder, stamp["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _digests(folder: Path, names: list[str] | dict[str, str]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def write_rows(path: Path, count: int, held_out: bool) -> None:
    """Write `count` rows of one part of the split as JSON Lines."""
    rows = (nli.row(argument) for argument in nli.arguments(count, held_out, SEED))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, console: Console, count: int) -> None:
    """Train a tokenizer and a base model on `count` documents, and save them in Hugging Face's form."""
    with console.status("Loading PyTorch and transformers"):
        import base_model
        import torch
        from transformers.utils import logging

    logging.disable_progress_bar()

    torch.set_num_threads(min(_THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2))
    documents = list(islice(prose.documents(SEED), count))
    tokenizer = base_model.train_tokenizer(documents[:TOKENIZER_DOCUMENTS])
    examples = base_model.encode(documents, tokenizer, random.Random(SEED))
    model = base_model.new_model(tokenizer, SEED)
    console.print(
        f"A tokenizer of {len(tokenizer)} tokens; a model of {model.num_parameters() / 1e6:.2f} million parameters"
    )
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("Pre-training")
        started, smooth = time.monotonic(), 0.0

        def show(seen: int, total: int, loss: float) -> None:
            nonlocal smooth
            smooth = smooth + 0.02 * (loss - smooth) if smooth else loss
            rate = seen / (time.monotonic() - started)
            text = f"Pre-training on plain sentences: loss {smooth:.2f}, {rate:,.0f} tokens/s"
            bar.update(task, completed=seen, total=total, description=text)

        base_model.pretrain(model, examples, SEED, show)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def build(folder: Path, console: Console, documents: int = DOCUMENTS) -> None:
    """Make `folder` anew. Its stamp is written last, so a build cut short counts for nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "model").mkdir(parents=True)
    write_rows(folder / "train.jsonl", TRAIN_ROWS, held_out=False)
    write_rows(folder / "eval.jsonl", EVAL_ROWS, held_out=True)
    console.print(f"{TRAIN_ROWS} training rows and {EVAL_ROWS} held-out rows")
    write_model(folder / "model", console, documents)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    (folder / _STAMP).write_text(json.dumps({"recipe": recipe(), "files": _digests(folder, files)}, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's base model and data set.")
    parser.add_argument("--force", action="store_true", help="make them anew even when they are current")
    force = parser.parse_args().force
    console = Console()
    if not force and is_current(BUILD):
        console.print("The quickstart's model and data set are current (--force makes them anew)")
        return
    started = time.monotonic()
    build(BUILD, console)
    console.print(
        f"Made {BUILD.relative_to(Path.cwd()) if BUILD.is_relative_to(Path.cwd()) else BUILD} "
        f"in {time.monotonic() - started:.0f} s"
    )


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("Stopped; what was half made is not used: run it again")
