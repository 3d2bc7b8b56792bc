"""The run's checkpoints in the store: find the one to resume from, upload new ones."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import structlog

from finetune_api import constants
from finetune_api.artifact_manifest import JobReference, StoreManifest
from finetune_api.gate import GateCheck
from finetune_api.status import Resumption
from finetune_api.uri import parse
from finetune_trainer.checkpoints import decision, divergence, remote
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.parse import require_fit, require_usable
from finetune_trainer.checkpoints.state import TrainingState
from finetune_trainer.errors import ConfigInvalid, Diverged
from finetune_trainer.runtime.distributed import run_on_rank_zero
from finetune_trainer.settings import Settings
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.open import open_store

log = structlog.get_logger(__name__)


class CheckpointManager:
    """Checkpoints of this run, and of no other.

    They carry the run's fingerprint (state.fingerprint): the spec, the base model's commit, what the data files held.
    Where that is the same, the run is the same whoever began it, so a job that was deleted and created anew goes on
    where the old one stopped, and only publishes what the old one had finished. Where it is not, the job is refused, or
    drops them with output.overwrite; never those of a job with another name, which may be running.

    Attributes:
        resumption: The checkpoint that `find` chose; known to rank 0.
    """

    def __init__(self, settings: Settings, on_saved: Callable[[float], None] = lambda _: None) -> None:
        """`on_saved` is told of each checkpoint in the store, with the seconds that saving it took."""
        spec = settings.spec
        credentials = Credentials.for_role("output", secrets_dir=settings.environment.secrets)
        beside = parse(spec.output.uri).join(constants.CHECKPOINTS_DIR)
        self._store: Store = open_store(beside, credentials, field="output.uri")
        #: Beside the output, wherever checkpoints lie: only who may write adapters there may say that one passes.
        self._decisions = self._store
        if spec.checkpoint.uri:
            self._store = open_store(parse(spec.checkpoint.uri), credentials, field="checkpoint.uri")
        self._spec = spec
        self._job = settings.job.metadata
        self._base_commit: str | None = None
        self._ranks = settings.ranks
        self._on_saved = on_saved
        self.resumption: Resumption | None = None

    def pinned_commit(self) -> str | None:
        """Return the hub's commit of the base model that an earlier attempt of this very job trained on.

        Pin it: a branch may move between attempts, even by a word in the README. None for a first attempt.
        """
        manifest = run_on_rank_zero(self._ranks, lambda: remote.newest(self._store))
        is_ours = manifest is not None and manifest.job is not None and manifest.job.uid == self._job.uid
        commit = manifest.base_commit if manifest and is_ours and self._job.uid else None
        return commit if commit and re.fullmatch("[0-9a-f]{40,64}", commit) else None

    def find(
        self,
        directory: RunDirectory,
        fingerprint: str,
        base_commit: str | None,
        tensors: Mapping[str, tuple[int, ...]],
    ) -> tuple[TrainingState, Path | None]:
        """Download the newest whole checkpoint that fits into `directory`.

        With several ranks, rank 0 chooses, so that all resume from one step. A collective.

        Args:
            directory: The run's files; metrics and best adapter become the checkpoint's.
            fingerprint: What decides this run's result; it goes with each checkpoint from here on.
            base_commit: The hub's commit of the base model, likewise.
            tensors: Names and shapes of this run's adapter; a checkpoint of this run with others is broken.

        Returns:
            The state to go on from, and the checkpoint's folder; a new state and None when there is no checkpoint.

        Raises:
            ConfigInvalid: The checkpoints are another run's, and output.overwrite does not allow to delete them.
        """
        self._base_commit = base_commit
        state, found = run_on_rank_zero(self._ranks, lambda: self._newest(directory, fingerprint, tensors))
        if found is None or self._ranks.is_main:
            return state, found
        local = directory.checkpoint(state.step)
        remote.restore(self._store, state.step, local)
        return directory.take_from_checkpoint(local), local

    def _newest(
        self, directory: RunDirectory, fingerprint: str, tensors: Mapping[str, tuple[int, ...]]
    ) -> tuple[TrainingState, Path | None]:
        def check(folder: Path, step: int) -> None:
            if require_usable(folder, step).fingerprint == fingerprint:
                require_fit(folder, tensors)

        new = TrainingState(fingerprint=fingerprint)
        manifest = remote.resume(self._store, directory.checkpoint, check=check)
        if manifest is None:
            return new, None
        local = directory.checkpoint(manifest.step or 0)
        state = directory.take_from_checkpoint(local)
        if state.fingerprint == fingerprint:
            owner = manifest.job.uid if manifest.job else None
            earlier = owner if owner != self._job.uid else None
            self.resumption = Resumption(step=state.step, job_uid=earlier[:64] if earlier else None)
            whose = f", which an earlier job of this name saved (uid {earlier})" if earlier else ""
            log.info(f"Resuming from the checkpoint at step {state.step}{whose}", step=state.step)
            return state, local
        self._refuse_unless_ours_to_drop(manifest)
        log.warning(f"Deleting the checkpoints of another run at {self._store.root} (output.overwrite is true)")
        directory.remove_checkpoint(local)
        self.delete()
        return new, None

    def _refuse_unless_ours_to_drop(self, manifest: StoreManifest) -> None:
        if remote.belongs_to_another(manifest, self._job):
            owner = manifest.job or JobReference()
            raise ConfigInvalid(
                f"{self._store.field}: {self._store.root} holds checkpoints of another job"
                f" ({'/'.join(part for part in (owner.namespace, owner.name) if part)}): choose another URI"
            )
        if not self._spec.output.overwrite:
            raise ConfigInvalid(
                f"{self._store.field}: {self._store.root} holds checkpoints of a run with another model, data set or"
                " hyperparameters: choose another URI, delete them, or set output.overwrite: true"
            )

    def upload(self, folder: Path, step: int) -> None:
        """Send the checkpoint in `folder`; it counts once its manifest is there."""
        began = time.monotonic()
        remote.save(folder, self._store, step, self._spec.checkpoint.keep, job=self._job, base_commit=self._base_commit)
        self._on_saved(time.monotonic() - began)
        log.info(f"Checkpoint of step {step} is saved", step=step, uri=str(self._store.root))

    def decided(self, fingerprint: str) -> list[GateCheck] | None:
        """Return what an earlier attempt of this run decided of publish.onlyIf; None where none has."""
        return decision.find(self._decisions, self._job, fingerprint) if self._spec.publish else None

    def keep_decision(self, fingerprint: str, checks: list[GateCheck]) -> None:
        """Keep what was decided of publish.onlyIf, until `finish`."""
        decision.keep(self._decisions, self._job, fingerprint, checks)

    def diverged(self, fingerprint: str) -> divergence.Divergence | None:
        """Return how an earlier attempt of this run has diverged; None where none has under `remembering`."""
        return divergence.find(self._decisions, self._job, fingerprint) if self._job.uid else None

    @contextmanager
    def remembering(self, fingerprint: str, directory: RunDirectory) -> Iterator[None]:
        """Keep that the run diverges inside the block, for attempts that are made for another run's sake."""
        try:
            yield
        except Diverged as error:
            losses = directory.eval_losses()
            found = divergence.Divergence(
                fingerprint=fingerprint, uid=self._job.uid, message=str(error), eval_losses=losses
            )
            if self._job.uid:
                divergence.keep(self._decisions, self._job, found)
            raise

    def finish(self) -> None:
        """Once the adapter is where it belongs: delete this job's checkpoints, unless output.keepCheckpoints is set."""
        if self._spec.publish:
            decision.delete(self._decisions, self._job)
        if not self._spec.output.keep_checkpoints:
            self.delete()

    def delete(self) -> None:
        """Delete this job's checkpoints, and nothing else that lies beside them."""
        remote.delete_all(self._store, self._job)
