"""Small files that an attempt leaves below output.uri for those after it: of one run of one job each."""

from pathlib import PurePosixPath
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from finetune_api.gate import candidate_folder
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.errors import StoreCorrupted, StoreNotFound
from finetune_trainer.stores.manifest import READS, Job


class Note(BaseModel):
    """What was found out, and of which run."""

    fingerprint: str
    uid: str | None = None


N = TypeVar("N", bound=Note)


class Unreadable(Exception):
    """There is a note, and nobody can tell what it says."""


def path_of(folder: str, job: Job) -> str:
    """Return where a job's note lies, below where its checkpoints do by default."""
    return f"{folder}/{PurePosixPath(candidate_folder(job.name, job.uid)).name}.json"


def keep(store: Store, folder: str, job: Job, note: Note) -> None:
    """Leave `note`."""
    store.write_bytes(path_of(folder, job), note.model_dump_json().encode())


def find(store: Store, folder: str, job: Job, fingerprint: str, kind: type[N]) -> N | None:
    """Return what an earlier attempt of this very run has left; None where that is nothing. Raises Unreadable."""
    for _ in range(READS):
        try:
            found = kind.model_validate_json(store.read_bytes(path_of(folder, job)))
        except StoreNotFound:
            return None
        except (StoreCorrupted, ValidationError):
            continue
        return found if (found.fingerprint, found.uid) == (fingerprint, job.uid) else None
    raise Unreadable(f"{store.uri_of(path_of(folder, job))} cannot be read")


def delete(store: Store, folder: str, job: Job) -> None:
    """Forget it."""
    store.delete(path_of(folder, job))
