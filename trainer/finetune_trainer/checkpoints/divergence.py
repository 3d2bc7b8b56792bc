"""That a trial which shares its process has diverged, kept below output.uri.

Its process goes on, and may be started again for another trial's sake: this one would only diverge again. What it had
measured counts where others are compared with it.
"""

from typing import Final

import structlog
from pydantic import Field

from finetune_trainer.checkpoints import notes
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.errors import StoreError
from finetune_trainer.stores.manifest import Job

log = structlog.get_logger(__name__)
_FOLDER: Final = "diverged"


class Divergence(notes.Note):
    """How a run diverged, and its evalLoss by step until then."""

    message: str = Field(min_length=1)
    eval_losses: dict[int, float] = {}


def keep(store: Store, job: Job, found: Divergence) -> None:
    """Keep it. A store that takes it not costs no more than that the trial diverges again."""
    try:
        notes.keep(store, _FOLDER, job, found)
    except StoreError as error:
        log.warning("That the trial has diverged could not be saved: another attempt trains it again", error=str(error))


def find(store: Store, job: Job, fingerprint: str) -> Divergence | None:
    """Return how an earlier attempt of this very run has diverged; None where that is not known."""
    try:
        return notes.find(store, _FOLDER, job, fingerprint, Divergence)
    except notes.Unreadable as error:
        log.warning(f"{error}: the trial is trained again")
        return None
