"""Weights & Biases, asked for by logging.wandb. The key goes to W&B's own settings only."""

import os
from collections.abc import Collection, Mapping

from finetune_trainer.reporting.tracker import Tracker
from finetune_trainer.settings import resolved_job


class WandbTracker(Tracker):
    """One W&B run per job, resumed by later attempts."""

    name = "wandb"
    title = "Weights & Biases"
    package = "wandb"
    setting = "spec.logging.wandb"

    def configured(self) -> bool:
        return self.job.spec.logging.wandb is not None

    def endpoint(self) -> str:
        return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"

    def open(self) -> None:
        import wandb

        asked = self.job.spec.logging.wandb
        assert asked is not None
        uid = self.job.metadata.uid
        self._run = wandb.init(
            project=asked.project,
            entity=asked.entity,
            name=asked.name or self.job.metadata.name,
            id=uid,
            resume="allow" if uid else None,
            config=resolved_job(self.job)["spec"],
            dir=os.environ.get("WANDB_DIR", str(self.work)),
            settings=wandb.Settings(
                base_url=self.endpoint(),
                api_key=self.credentials.get("WANDB_API_KEY"),
                silent=True,
                console="off",
                x_disable_stats=True,
                save_code=False,
            ),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, succeeded: bool) -> None:
        self._run.finish(exit_code=0 if succeeded else 1)

    def secrets(self) -> Collection[str]:
        key = self.credentials.get("WANDB_API_KEY")
        return (key,) if key else ()
