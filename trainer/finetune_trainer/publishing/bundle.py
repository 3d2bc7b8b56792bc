"""The folder to publish: the adapter, and with it tokenizer, model card, resolved job, environment, log, loss curve.

torch is imported only once a bundle is written: publish.py needs the Bundle before that.
"""

import json
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import structlog
import yaml

from finetune_api import constants
from finetune_api.artifact_manifest import Lineage, StoreManifest
from finetune_api.gate import GateCheck
from finetune_api.spec import FineTuneJob
from finetune_api.status import ExecutionPlan
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.model.base import BaseModel
from finetune_trainer.publishing import model_card
from finetune_trainer.publishing.artifact import Artifact, Trained
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.loss_curve import plot_loss
from finetune_trainer.reporting.logs import LOG_FILE
from finetune_trainer.settings import resolved_job

log = structlog.get_logger(__name__)
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


@dataclass(frozen=True)
class Bundle:
    """A folder that is ready to be published, and what its manifest says of it."""

    folder: Path
    artifact: Artifact
    base_model: str
    rank: int
    metrics: Mapping[str, float]
    step: int | None = None
    base_commit: str | None = None
    lineage: Lineage | None = None
    gate: tuple[GateCheck, ...] = ()


def write_bundle(
    job: FineTuneJob,
    model: Any,
    base: BaseModel,
    plan: ExecutionPlan,
    state: TrainingState,
    directory: RunDirectory,
    row_format: str,
    lineage: Lineage,
) -> Bundle:
    """Write all that is published into directory.adapter.

    Args:
        job: The job whose adapter it is.
        model: The trained PEFT model; gets the weights of the best evaluation if the job keeps the best.
        base: The base model's name and tokenizer.
        plan: The execution plan at the end of training.
        state: The state at the end of training.
        directory: The run's files; metrics.jsonl is already in place.
        row_format: The format that the training rows were read in.
        lineage: What the adapter was made of.

    Returns:
        The folder and the facts for its manifest.
    """
    from finetune_trainer.model.adapter import load_adapter_weights

    artifact = ARTIFACTS["Adapter"]
    spec = job.spec
    metrics = state.final_metrics(keep_best=spec.evaluation.keep_best)
    if spec.evaluation.keep_best and directory.best.exists():
        log.info(f"Keeping the adapter of step {state.best_step}, the best evaluation")
        load_adapter_weights(model, directory.best)
    artifact.build(Trained(spec, model, base, plan), directory.adapter)
    base.tokenizer.save_pretrained(str(directory.adapter))
    found = environment(plan)
    write_provenance(job, found, directory, row_format)
    facts = model_card.Facts(
        base.name,
        base.commit,
        base.tokenizer.pad_token,
        row_format,
        found,
        state.train_seconds,
        plan.world_size or 1,
        lineage,
    )
    card = model_card.render(job, metrics, facts)
    (directory.adapter / "README.md").write_text(card)
    return Bundle(directory.adapter, artifact, base.name, spec.lora.rank, metrics, state.step, base.commit, lineage)


def published_bundle(folder: Path) -> Bundle:
    """Return the adapter in `folder`, a copy that was compared with its manifest, to publish it in another place."""
    found = StoreManifest.model_validate_json((folder / constants.MANIFEST_FILE).read_bytes())
    return Bundle(
        folder,
        ARTIFACTS["Adapter"],
        found.base_model or "",
        found.rank or 0,
        found.metrics or {},
        found.step,
        found.base_commit,
        found.lineage,
        tuple(found.gate or ()),
    )


def write_provenance(job: FineTuneJob, found: Mapping[str, Any], directory: RunDirectory, row_format: str) -> None:
    """Write directory.training: the resolved job, the environment, the log and the loss curve.

    The job has the format that the rows were read in where it said auto: who asks the adapter writes prompts in it.
    """
    resolved = resolved_job(job)
    resolved["spec"]["dataset"]["format"] = row_format
    training = directory.training
    training.mkdir(parents=True, exist_ok=True)
    (training / "job.yaml").write_text(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    (training / "environment.json").write_text(json.dumps(found, indent=2) + "\n")
    if (log_file := directory.root / LOG_FILE).exists():
        shutil.copy2(log_file, training / LOG_FILE)
    plot_loss(read_metrics(directory.metrics_file), training / "loss.png")


def environment(plan: ExecutionPlan) -> dict[str, Any]:
    """Return versions and hardware: what it takes to repeat the run."""
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
    """Return the lines of training/metrics.jsonl; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
