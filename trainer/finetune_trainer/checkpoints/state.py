"""What a run must remember beyond weights and optimizer to go on as if it had never stopped; part of a checkpoint."""

import hashlib
import json
import shutil
from array import array
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from finetune_api import constants
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.dataset import Encoded
from finetune_trainer.stores.json_numbers import finite

STATE_FILE = "finetune_state.json"
BEST_DIR = "best"
_METRICS = Path(constants.METRICS_FILE).name


@dataclass
class RunState:
    """Progress of one run. `metrics` are those of the latest evaluation, `best` and `before` those of two others.

    `finished`: no step is left to train; an evaluation may still be due.
    """

    fingerprint: str = ""
    step: int = 0
    finished: bool = False
    before: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    value_to_beat: float | None = None
    evaluations_without_gain: int = 0
    evaluation_due: bool = False
    tokens: int = 0
    train_seconds: float = 0.0
    loss_since_log: float = 0.0
    last_logged_step: int = 0

    def metrics_before(self) -> dict[str, float]:
        """The metrics ahead of training as `<name>Before`; the confusion matrix is left out."""
        return {f"{key}Before": value for key, value in self.before.items() if "." not in key}

    def final_metrics(self, keep_best: bool) -> dict[str, float]:
        """The metrics of the adapter to publish, with those before training as `<name>Before`, and the speed."""
        chosen = self.best if keep_best and self.best else self.metrics
        metrics = chosen | self.metrics_before() | {"trainSeconds": round(self.train_seconds, 3)}
        if self.train_seconds:
            metrics["tokensPerSecond"] = round(self.tokens / self.train_seconds, 1)
        return finite(metrics)

    def save(self, folder: Path) -> None:
        (folder / STATE_FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> "RunState":
        """What `save` wrote to `folder`, perhaps by another version: what this one does not know is left out."""
        known = {field.name for field in fields(cls)}
        found = json.loads((folder / STATE_FILE).read_text())
        return cls(**{key: value for key, value in found.items() if key in known})


@dataclass(frozen=True)
class RunFolder:
    """The run's files on local disk."""

    root: Path

    @property
    def training(self) -> Path:
        return self.root / "adapter" / constants.TRAINING_DIR

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def metrics_file(self) -> Path:
        return self.root / "adapter" / constants.METRICS_FILE

    @property
    def best(self) -> Path:
        return self.root / BEST_DIR

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Where transformers' Trainer puts the checkpoint of `step`."""
        return self.checkpoints / f"checkpoint-{step}"

    def record(self, **values: Any) -> None:
        """Append one line to training/metrics.jsonl. Values that JSON has no number for are left out."""
        self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(finite(values), allow_nan=False) + "\n")

    def keep_steps(self, last: int) -> None:
        """Drop what training/metrics.jsonl says of steps after `last`, and the best adapter."""
        if self.metrics_file.exists():
            lines = self.metrics_file.read_text().splitlines(keepends=True)
            self.metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= last))
        shutil.rmtree(self.best, ignore_errors=True)

    def add_to_checkpoint(self, folder: Path, state: RunState) -> None:
        """Put the run's memory next to the Trainer's files in `folder`."""
        state.save(folder)
        if self.metrics_file.exists():
            shutil.copy2(self.metrics_file, folder / _METRICS)
        if self.best.exists():
            shutil.copytree(self.best, folder / BEST_DIR, dirs_exist_ok=True)

    def take_from_checkpoint(self, folder: Path) -> RunState:
        """Make metrics file and best adapter those of the checkpoint in `folder`; return its state."""
        self.metrics_file.unlink(missing_ok=True)
        shutil.rmtree(self.best, ignore_errors=True)
        if (folder / _METRICS).exists():
            self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / _METRICS, self.metrics_file)
        if (folder / BEST_DIR).exists():
            shutil.copytree(folder / BEST_DIR, self.best)
        return RunState.load(folder)

    def forget(self, checkpoint: Path) -> None:
        """Undo take_from_checkpoint."""
        self.metrics_file.unlink(missing_ok=True)
        shutil.rmtree(self.best, ignore_errors=True)
        shutil.rmtree(checkpoint, ignore_errors=True)


def fingerprint(spec: FineTuneJobSpec, base_commit: str | None, *rows: Encoded) -> str:
    """A digest of what decides the result: a checkpoint is resumed only by a run of the same fingerprint.

    That is the spec, the base model's commit on the hub, and what the data files held (`rows`: training and held-out
    rows as token ids), for a URI stays when what lies there is replaced. Weights replaced under one file:// or s3://
    URI are not noticed. The micro-batch is left out, for it may shrink between attempts; so is all that only says how
    to run or report.
    """
    manifest = spec.manifest()
    parts: dict[str, Any] = {key: manifest[key] for key in ("model", "dataset", "quantization", "lora", "training")}
    parts["training"] = {key: value for key, value in manifest["training"].items() if key not in _HOW}
    parts["model"].pop("secretRef", None)
    parts["model"].pop("attention", None)
    parts["dataset"].pop("secretRef", None)
    parts["evaluation"] = manifest["evaluation"]  # decides when to stop, and which adapter is the best
    parts["commit"] = base_commit
    parts["rows"] = [_digest(each) for each in rows]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_HOW = ("microBatchSize", "packing", "gradientCheckpointing")


def _digest(rows: Encoded) -> str:
    sha = hashlib.sha256()
    for ids, labels in zip(rows.input_ids, rows.labels, strict=True):
        sha.update(array("i", (len(ids), *ids, *labels)).tobytes())
    return sha.hexdigest()
