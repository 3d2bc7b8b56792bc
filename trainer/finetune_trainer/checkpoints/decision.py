"""What publish.onlyIf decided, kept below output.uri from before anything is published until all of it is.

An attempt that is killed in between has perhaps deleted the adapter that it replaces. The next one must not decide
anew: the adapter to beat may be another by then.
"""

from pathlib import PurePosixPath
from typing import Final

import structlog
from pydantic import BaseModel, Field, ValidationError

from finetune_api.gate import MAX_CHECKS, GateCheck, candidate_folder
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.errors import StoreCorrupted, StoreNotFound
from finetune_trainer.stores.manifest import READS, Job

log = structlog.get_logger(__name__)
_FOLDER: Final = "gate"


class Decision(BaseModel):
    """What became of the conditions, and of which run."""

    fingerprint: str
    uid: str | None = None
    checks: list[GateCheck] = Field(min_length=1, max_length=MAX_CHECKS)


def _path(job: Job) -> str:
    return f"{_FOLDER}/{PurePosixPath(candidate_folder(job.name, job.uid)).name}.json"


def keep(store: Store, job: Job, fingerprint: str, checks: list[GateCheck]) -> None:
    """Keep what was decided of the run with that fingerprint."""
    decision = Decision(fingerprint=fingerprint, uid=job.uid, checks=checks)
    store.write_bytes(_path(job), decision.model_dump_json().encode())


def find(store: Store, job: Job, fingerprint: str) -> list[GateCheck] | None:
    """Return what an earlier attempt of this very run decided; None where there is nothing that can be read."""
    for _ in range(READS):
        try:
            found = Decision.model_validate_json(store.read_bytes(_path(job)))
        except StoreNotFound:
            return None
        except (StoreCorrupted, ValidationError):
            continue
        return found.checks if (found.fingerprint, found.uid) == (fingerprint, job.uid) else None
    log.warning(f"{store.uri_of(_path(job))} cannot be read: publish.onlyIf is decided again")
    return None


def delete(store: Store, job: Job) -> None:
    """Forget what was decided."""
    store.delete(_path(job))
