"""The files that go with an adapter: model card, resolved job, environment, log, loss curve."""

import json
import platform
import shutil
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from finetune_api.spec import FineTuneJob
from finetune_api.status import ExecutionPlan
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.publishing import model_card
from finetune_trainer.settings import resolved_job

_PACKAGES = (
    "finetune-operator",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "safetensors",
)


def write(
    folder: RunDirectory,
    job: FineTuneJob,
    tokenizer: Any,
    plan: ExecutionPlan,
    metrics: dict[str, float],
    base_model: str,
    log_file: Path,
) -> None:
    """Complete folder.adapter, which holds the adapter's two files, for publication."""
    tokenizer.save_pretrained(str(folder.adapter))
    training = folder.training
    training.mkdir(parents=True, exist_ok=True)
    (training / "job.yaml").write_text(yaml.safe_dump(resolved_job(job), sort_keys=False, allow_unicode=True))
    (training / "environment.json").write_text(json.dumps(environment(plan), indent=2) + "\n")
    if log_file.exists():
        shutil.copy2(log_file, training / "log.txt")
    plot_loss(read_metrics(folder.metrics_file), training / "loss.png")
    (folder.adapter / "README.md").write_text(model_card.render(job, metrics, base_model))


def environment(plan: ExecutionPlan) -> dict[str, Any]:
    """Versions and hardware: what it takes to repeat the run."""
    import torch

    found: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "packages": found,
        "cuda": torch.version.cuda if gpus else None,
        "gpus": gpus,
        "executionPlan": plan.manifest(),
    }


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of training/metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot_loss(lines: Iterable[dict[str, Any]], path: Path) -> None:
    """Training and evaluation loss (nats per token) over optimizer steps, as PNG."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    lines = list(lines)
    figure = matplotlib.figure.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("evalLoss", "held-out", "o-")):
        points = [(line["step"], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, metadata={"Software": None})
