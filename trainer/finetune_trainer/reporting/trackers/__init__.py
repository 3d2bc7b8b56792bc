"""The experiment trackers, one module each. Code behind them sees a Tracker, never its name."""

from typing import Final

from finetune_trainer.reporting.tracker import Tracker
from finetune_trainer.reporting.trackers.mlflow import MlflowTracker
from finetune_trainer.reporting.trackers.wandb import WandbTracker

TRACKERS: Final[dict[str, type[Tracker]]] = {each.name: each for each in (WandbTracker, MlflowTracker)}
