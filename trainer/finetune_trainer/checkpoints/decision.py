"""What publish.onlyIf decided, kept below output.uri from before anything is published until all of it is.

An attempt that is killed in between has perhaps deleted the adapter that it replaces. The next one must not decide
anew: the adapter to beat may be another by then.
"""

from typing import Final

import structlog
from pydantic import Field

from finetune_api.gate import MAX_CHECKS, GateCheck
from finetune_trainer.checkpoints import notes
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.manifest import Job

log = structlog.get_logger(__name__)
_FOLDER: Final = "gate"


class Decision(notes.Note):
    """What became of the conditions."""

    checks: list[GateCheck] = Field(min_length=1, max_length=MAX_CHECKS)


def keep(store: Store, job: Job, fingerprint: str, checks: list[GateCheck]) -> None:
    """Keep what was decided of the run with that fingerprint."""
    notes.keep(store, _FOLDER, job, Decision(fingerprint=fingerprint, uid=job.uid, checks=checks))


def find(store: Store, job: Job, fingerprint: str) -> list[GateCheck] | None:
    """Return what an earlier attempt of this very run decided; None where there is nothing that can be read."""
    try:
        found = notes.find(store, _FOLDER, job, fingerprint, Decision)
    except notes.Unreadable as error:
        log.warning(f"{error}: publish.onlyIf is decided again")
        return None
    return found.checks if found else None


def delete(store: Store, job: Job) -> None:
    """Forget what was decided."""
    notes.delete(store, _FOLDER, job)
