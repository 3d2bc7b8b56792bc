"""The tables of benchmarks/gpu, for tests that hold their figures as limits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks/gpu"


def mistral_shaped(folders: pytest.TempPathFactory) -> Path:
    """A model of Mistral-7B-v0.3's shape: 14.5 GB, random weights, made once; GPU_TEST_MODEL names a folder for it."""
    kept = os.environ.get("GPU_TEST_MODEL")
    folder = Path(kept) if kept else folders.getbasetemp() / "mistral"
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, BENCHMARKS / "reference.py", "build", folder], check=True)
    return folder


def results(model: Path, table: str) -> list[dict[str, Any]]:
    """The lines of one of the tables, printed too."""
    answer = subprocess.run(
        [sys.executable, BENCHMARKS / "trainer.py", model, table], capture_output=True, text=True, check=True
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("RESULT")]
    print(*lines, sep="\n")
    return [json.loads(line.removeprefix("RESULT")) for line in lines]
