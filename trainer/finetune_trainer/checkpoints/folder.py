"""The run's files on local disk."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from finetune_api import constants
from finetune_trainer.checkpoints.state import TrainingState

BEST_DIR = "best"
_METRICS = Path(constants.METRICS_FILE).name


@dataclass(frozen=True)
class RunDirectory:
    """The run's files on local disk."""

    root: Path

    @property
    def inputs(self) -> Path:
        """What is read of the base model and of an earlier adapter."""
        return self.root / "inputs"

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
    def published(self) -> Path:
        """Where a published adapter is downloaded to, to be loaded back."""
        return self.root / "published"

    @property
    def best(self) -> Path:
        return self.root / BEST_DIR

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """Where transformers' Trainer puts the checkpoint of `step`."""
        return self.checkpoints / f"checkpoint-{step}"

    def keep_steps(self, last: int) -> None:
        """Drop what training/metrics.jsonl says of steps after `last`, and the best adapter."""
        if self.metrics_file.exists():
            lines = self.metrics_file.read_text().splitlines(keepends=True)
            self.metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= last))
        shutil.rmtree(self.best, ignore_errors=True)

    def add_to_checkpoint(self, folder: Path, state: TrainingState) -> None:
        """Put the run's memory next to the Trainer's files in `folder`."""
        state.save(folder)
        if self.metrics_file.exists():
            shutil.copy2(self.metrics_file, folder / _METRICS)
        if self.best.exists():
            shutil.copytree(self.best, folder / BEST_DIR, dirs_exist_ok=True)

    def take_from_checkpoint(self, folder: Path) -> TrainingState:
        """Make metrics file and best adapter those of the checkpoint in `folder`; return its state."""
        self.metrics_file.unlink(missing_ok=True)
        shutil.rmtree(self.best, ignore_errors=True)
        if (folder / _METRICS).exists():
            self.metrics_file.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / _METRICS, self.metrics_file)
        if (folder / BEST_DIR).exists():
            shutil.copytree(folder / BEST_DIR, self.best)
        return TrainingState.load(folder)

    def remove_checkpoint(self, checkpoint: Path) -> None:
        """Undo take_from_checkpoint, and delete the local copy."""
        self.metrics_file.unlink(missing_ok=True)
        shutil.rmtree(self.best, ignore_errors=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
