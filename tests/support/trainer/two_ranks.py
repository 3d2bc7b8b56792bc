"""Two trainer processes that are one training: forked by hand, or under a real torchrun."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from finetune_api import constants
from finetune_api.status import TrainerReport
from support.common.processes import free_port
from support.trainer.process import Finished, TrainerProcess


def rendezvous() -> dict[str, str]:
    """Where processes of one training meet, as torchrun's variables."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


class Pair:
    """Two trainer processes that torchrun's variables make one training, each in a fork."""

    def __init__(
        self,
        config: Path,
        folder: Path,
        env: dict[str, str] | None = None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **rendezvous()}
        self._termination = folder / "termination.json"
        shared[constants.ENV_TERMINATION_LOG] = str(self._termination)
        self.ranks = [
            TrainerProcess(
                config,
                folder / str(rank),
                env=shared | (env or {}) | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                before=before,
            )
            for rank in (0, 1)
        ]

    def finish(self) -> list[Finished]:
        return [rank.finish() for rank in self.ranks]

    def report(self) -> TrainerReport:
        """What both have left, after the end."""
        return TrainerReport.model_validate_json(self._termination.read_text())


class Torchrun:
    """Two trainers under a real torchrun."""

    def __init__(self, config: Path, folder: Path, env: dict[str, str] | None = None) -> None:
        self._termination, self._log = folder / "termination.json", folder / "torchrun.log"
        settings = {
            constants.ENV_SCRATCH_DIR: str(folder / "scratch"),
            constants.ENV_TERMINATION_LOG: str(self._termination),
            constants.ENV_LISTEN: "127.0.0.1:0",
            "OMP_NUM_THREADS": "1",
        }
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [*torchrun, "-m", "finetune_trainer", "--config", str(config)]
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                command, env=os.environ | settings | (env or {}), stdout=output, stderr=subprocess.STDOUT
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for(self, text: str) -> None:
        while text not in self.log:
            assert self.process.poll() is None, f"torchrun ended without {text!r}:\n{self.log[-3000:]}"
            time.sleep(0.01)

    def finish(self) -> TrainerReport:
        """The report after the end; `process.returncode` is torchrun's, which hides the trainers' own."""
        self.process.wait()
        return TrainerReport.model_validate_json(self._termination.read_text())
