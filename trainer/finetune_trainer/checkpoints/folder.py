"""The run's files on local disk."""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from finetune_api import constants
from finetune_trainer.checkpoints.state import TrainingState

BEST_DIR = "best"
#: What training writes for the adapter's folder while it runs.
_WRITTEN = (constants.METRICS_FILE, constants.ANSWERS_FILE)


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
    def answers_file(self) -> Path:
        return self.adapter / constants.ANSWERS_FILE

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

    def eval_losses(self) -> dict[int, float]:
        """Return the evalLoss by step: as far as this process has it, or as an earlier one published it."""
        for file in (self.metrics_file, self.published / constants.METRICS_FILE):
            if file.exists():
                return dict(_eval_losses(file))
        return {}

    def remove_own(self) -> None:
        """Delete what the run has written, once it is in the store; other runs may read what lies in `inputs`."""
        for folder in (self.checkpoints, self.adapter, self.published, self.best):
            shutil.rmtree(folder, ignore_errors=True)

    def keep_steps(self, last: int) -> None:
        """Drop what training/metrics.jsonl says of steps after `last`, the answers, and the best adapter."""
        if self.metrics_file.exists():
            lines = self.metrics_file.read_text().splitlines(keepends=True)
            self.metrics_file.write_text("".join(line for line in lines if json.loads(line)["step"] <= last))
        self.answers_file.unlink(missing_ok=True)
        shutil.rmtree(self.best, ignore_errors=True)

    def add_to_checkpoint(self, folder: Path, state: TrainingState) -> None:
        """Put the run's memory next to the Trainer's files in `folder`."""
        state.save(folder)
        for path in _WRITTEN:
            if (file := self.adapter / path).exists():
                shutil.copy2(file, folder / file.name)
        if self.best.exists():
            shutil.copytree(self.best, folder / BEST_DIR, dirs_exist_ok=True)

    def take_from_checkpoint(self, folder: Path) -> TrainingState:
        """Make metrics, answers and best adapter those of the checkpoint in `folder`; return its state."""
        self._forget()
        for path in _WRITTEN:
            if (saved := folder / Path(path).name).exists():
                self.training.mkdir(parents=True, exist_ok=True)
                shutil.copy2(saved, self.adapter / path)
        if (folder / BEST_DIR).exists():
            shutil.copytree(folder / BEST_DIR, self.best)
        return TrainingState.load(folder)

    def remove_checkpoint(self, checkpoint: Path) -> None:
        """Undo take_from_checkpoint, and delete the local copy."""
        self._forget()
        shutil.rmtree(checkpoint, ignore_errors=True)

    def _forget(self) -> None:
        for path in _WRITTEN:
            (self.adapter / path).unlink(missing_ok=True)
        shutil.rmtree(self.best, ignore_errors=True)


def _eval_losses(file: Path) -> Iterator[tuple[int, float]]:
    for line in file.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):  # a store's file may hold anything
            found = json.loads(line)
            step, loss = (found.get(key) if isinstance(found, dict) else None for key in ("step", "evalLoss"))
            if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss):
                yield step, loss
