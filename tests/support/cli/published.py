"""Published adapters in folders, with what `finetune compare` reads of them, written by hand."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import yaml

#: A row of training/answers.jsonl.
ROW = {
    "row": 0,
    "prompt": "[INST] Premise: Ada owns a spaniel. Hypothesis: Ada owns a dog. [/INST]",
    "expected": '{"thought_process": "A spaniel is a dog.", "predicted_label": 1}',
    "answer": '{"thought_process": "A spaniel is a dog.", "predicted_label": 1}',
    "label": "1",
    "right": True,
}


def metrics_lines(start: float, end: float, steps: int = 60) -> str:
    """training/metrics.jsonl of a run whose loss falls from `start` to `end`."""
    lines: list[dict[str, Any]] = [{"step": 0, "evalLossBefore": start}]
    for step in range(1, steps + 1):
        loss = end + (start - end) * math.exp(-5 * step / steps)
        lines.append({"step": step, "loss": loss + 0.02 * math.sin(step * 2.3)})
        lines += [{"step": step, "evalLoss": loss + 0.01}] if step % 10 == 0 else []
    return "".join(json.dumps(line) + "\n" for line in lines)


def publish(folder: Path, spec: dict[str, Any], metrics: dict[str, float], files: dict[str, str]) -> Path:
    """Write an adapter's folder: its manifest lists `files` and training/job.yaml with `spec`."""
    job = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": folder.name},
        "spec": {
            "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
            "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/test.jsonl"},
            "output": {"uri": f"file://{folder}"},
        }
        | spec,
    }
    files = {"adapter_config.json": "{}", "training/job.yaml": yaml.safe_dump(job)} | files
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    records = [
        {"path": path, "sizeBytes": len(text.encode()), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        for path, text in files.items()
    ]
    manifest = {
        "schemaVersion": 1,
        "kind": "Adapter",
        "createdAt": "2026-01-01T00:00:00Z",
        "files": records,
        "metrics": metrics,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run(folder: Path, rate: float, rank: int, loss: float, rows: list[dict[str, Any]] | None = None) -> Path:
    """Publish a run with these values, its curves, and its answers to `rows`."""
    answers = [ROW] if rows is None else rows
    metrics = {"evalLossBefore": 2.4, "evalLoss": loss, "accuracyBefore": 0.5, "accuracy": 0.9, "trainSeconds": 3600.0}
    metrics |= {"confusion.0.0": 90.0, "confusion.0.1": 10.0, "confusion.1.0": 8.0, "confusion.1.1": 92.0}
    files = {
        "training/metrics.jsonl": metrics_lines(2.4, loss),
        "training/answers.jsonl": "".join(json.dumps(row) + "\n" for row in answers),
    }
    spec = {
        "training": {"learningRate": rate},
        "lora": {"rank": rank},
        "resources": {"gpusPerNode": 2},
    }
    return publish(folder, spec, metrics, files)
