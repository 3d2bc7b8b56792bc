"""The run's checkpoints in the object store: which one to go on from, and sending new ones."""

import time
from collections.abc import Callable
from pathlib import Path

import structlog

from finetune_api import names
from finetune_api.uri import parse
from finetune_trainer import checkpoint, processes
from finetune_trainer.config import Settings
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.state import RunFolder, RunState, fingerprint
from finetune_trainer.store import Store, open_store

log = structlog.get_logger(__name__)


class Checkpoints:
    """Checkpoints of this run, and of no other: they carry the run's fingerprint."""

    def __init__(self, settings: Settings, on_saved: Callable[[float], None] = lambda _: None) -> None:
        """`on_saved` is told of each checkpoint in the store, with the seconds that saving it took."""
        spec = settings.spec
        uri = parse(spec.checkpoint.uri) if spec.checkpoint.uri else parse(spec.output.uri).join(names.CHECKPOINTS_DIR)
        credentials = Credentials.for_role("output", secrets_dir=settings.place.secrets)
        self._store: Store = open_store(uri, credentials, field="checkpoint.uri")
        self._spec = spec
        self._world = settings.world
        self._on_saved = on_saved

    def resume(self, folder: RunFolder) -> tuple[Path | None, RunState]:
        """Bring the newest whole checkpoint here; returns its folder (None: there is none) and the state in it.

        Of several processes rank 0 chooses, for all to go on from one step. Raises ConfigInvalid when the checkpoints
        are another run's, unless output.overwrite says to drop them.
        """
        found, state = processes.on_main(self._world, lambda: self._newest(folder))
        if found is None or self._world.is_main:
            return found, state
        local = folder.checkpoint(state.step)
        checkpoint.restore(self._store, state.step, local)
        return local, folder.take_from_checkpoint(local)

    def _newest(self, folder: RunFolder) -> tuple[Path | None, RunState]:
        mine = fingerprint(self._spec)
        step = checkpoint.latest(self._store)
        if step is None:
            return None, RunState(fingerprint=mine)
        local = folder.checkpoint(step)
        checkpoint.restore(self._store, step, local)
        state = folder.take_from_checkpoint(local)
        if state.fingerprint == mine:
            log.info(f"Going on from the checkpoint of step {step}", step=step)
            return local, state
        if not self._spec.output.overwrite:
            raise ConfigInvalid(
                f"checkpoint.uri: {self._store.root} holds checkpoints of a run with another model, data set or"
                " hyperparameters: choose another URI, delete them, or set output.overwrite: true"
            )
        log.warning(f"Deleting the checkpoints of another run at {self._store.root} (output.overwrite is true)")
        folder.forget(local)
        self.delete()
        return None, RunState(fingerprint=mine)

    def upload(self, folder: Path, step: int) -> None:
        """Send the checkpoint in `folder`; it counts once its manifest is there."""
        began = time.monotonic()
        checkpoint.save(folder, self._store, step, self._spec.checkpoint.keep)
        self._on_saved(time.monotonic() - began)
        log.info(f"Checkpoint of step {step} is saved", step=step, uri=str(self._store.root))

    def delete(self) -> None:
        """Remove the checkpoints, and nothing else that lies beside them."""
        checkpoint.delete_all(self._store)
