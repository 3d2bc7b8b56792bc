"""The trainer as a process of its own on a GPU, on files that are made for it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support.trainer.tiny_model import build_model, nli_rows, write_jsonl


def make_material(folder: Path, experts: int = 0) -> Path:
    """A small model, with `experts` or dense, and rows of about 500 tokens."""
    build_model(folder / "model", hidden_size=256, layers=4, experts=experts)
    make_rows(folder / "train.jsonl")
    return folder


def make_rows(path: Path) -> None:
    """512 rows of about 500 tokens of that model."""
    rows = nli_rows(8 * 512)
    write_jsonl(path, ({"text": " ".join(row["text"] for row in rows[i : i + 8])} for i in range(0, len(rows), 8)))


def _spec(material: Path, work: Path, gpus: int) -> dict[str, Any]:
    return {
        "model": {"source": f"file://{material}/model"},
        "dataset": {"train": f"file://{material}/train.jsonl"},
        "output": {"uri": f"file://{work}/out"},
        "resources": {"gpusPerNode": gpus},
        "logging": {"everySteps": 1},
    }


def start(material: Path, work: Path, prelude: str = "", gpus: int = 1, **settings: Any) -> subprocess.Popen[str]:
    """Train the model in `material`; `settings` are fields of spec with __ for dots. `prelude` is Python run first."""
    manifest = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "gpu", "uid": "11111111-2222-3333-4444-555555555555"},
        "spec": _spec(material, work, gpus),
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    return launch(manifest, work, words, prelude, gpus)


def start_sweep(
    material: Path, work: Path, trials: dict[str, dict[str, Any]], **settings: Any
) -> subprocess.Popen[str]:
    """Train the model in `material` in one process as often as there are `trials`, each with its changes."""
    template = _spec(material, work, gpus=1)
    for key, value in settings.items():
        section, _, field = key.partition("__")
        template.setdefault(section, {})[field] = value
    named = [{"name": name, "values": values} for name, values in trials.items()]
    sweep = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneSweep",
        "metadata": {"name": "gpu"},
        "spec": {
            "template": template,
            "trials": named,
            "parallelism": len(trials),
            "objective": {"metric": "trainLoss"},
        },
    }
    return launch(sweep, work)


def launch(
    manifest: dict[str, Any], work: Path, words: Sequence[str] = (), prelude: str = "", gpus: int = 1
) -> subprocess.Popen[str]:
    """Start the trainer on `manifest` with these words on its command line."""
    work.mkdir(exist_ok=True)
    (work / "job.yaml").write_text(json.dumps(manifest))
    environment = os.environ | {
        "FINETUNE_SCRATCH_DIR": str(work / "scratch"),
        "FINETUNE_TERMINATION_LOG": str(work / "report.json"),
        "FINETUNE_LISTEN": "127.0.0.1:0",
    }
    (work / "run.py").write_text(f"{prelude}\nfrom finetune_trainer.cli import cli\ncli()\n")
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(work / "run.py"), "--config", str(work / "job.yaml"), *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def losses(work: Path) -> list[float]:
    lines = (work / "out/training/metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def report(work: Path) -> dict[str, Any]:
    return dict(json.loads((work / "report.json").read_text()))
