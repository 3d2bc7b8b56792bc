"""The tables of benchmarks/gpu, for tests that hold their figures as limits."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks/gpu"


def mistral_shaped(folders: pytest.TempPathFactory) -> Path:
    """A model of Mistral-7B-v0.3's shape: 14.5 GB, random weights, made once; GPU_TEST_MODEL names a folder for it."""
    kept = os.environ.get("GPU_TEST_MODEL")
    folder = Path(kept) if kept else folders.getbasetemp() / "mistral"
    if not (folder / "config.json").exists():
        subprocess.run([sys.executable, BENCHMARKS / "reference.py", "build", folder], check=True)
    return folder


def results(model: Path, table: str, *settings: str) -> list[dict[str, Any]]:
    """The lines of one of the tables, printed as they come. AssertionError with the log of a setting that failed."""
    command = [sys.executable, str(BENCHMARKS / "trainer.py"), str(model), table, *settings]
    found = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if line.startswith("RESULT"):
                print(line, end="", flush=True)
                found.append(json.loads(line.removeprefix("RESULT")))
    assert running.returncode == 0
    assert not [result for result in found if "why" in result], "its own words say why"
    return found
