"""Checkpoints in a store: hashed, manifest last, and never trusted because a folder is there.

Below the store's root each lies in step-00000500/ with its manifest.json. Only one trainer of a job runs at a time, so
whatever else lies there is debris of an interrupted save.
"""

import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from finetune_api import constants
from finetune_api.artifact_manifest import JobReference, StoreManifest
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.base import OnProgress, Store
from finetune_trainer.stores.digest import digest_file
from finetune_trainer.stores.errors import (
    StoreCorrupted,
    StoreError,
    StoreNotFound,
    on_local_disk,
)
from finetune_trainer.stores.manifest import Job

log = structlog.get_logger(__name__)

_FOLDER: Final = re.compile(r"step-([0-9]{8,15})")
_FILES_AT_ONCE: Final = 3


def folder_of(step: int) -> str:
    """'step-00000500' for 500."""
    return f"step-{step:08d}"


def save(
    folder: Path,
    store: Store,
    step: int,
    keep: int,
    *,
    job: Job | None = None,
    base_commit: str | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Store every file below `folder` as `job`'s checkpoint of `step`, then drop all but the newest `keep`.

    `base_commit` is the hub's commit of the base model. Returns when the checkpoint is whole in the store. Trouble with
    dropping old ones is logged, never raised.
    """
    target = folder_of(step)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    with _several_at_once() as pool:
        digests = {
            path.relative_to(folder).as_posix(): digest
            for path, digest in zip(files, pool.map(digest_file, files), strict=True)
        }
        manifest = StoreManifest(
            kind="Checkpoint",
            job=JobReference(namespace=job.namespace, name=job.name, uid=job.uid) if job else None,
            created_at=datetime.now(UTC),
            base_commit=base_commit,
            step=step,
            files=store_manifest.records(digests),
        )
        store.delete(store_manifest.manifest_path(target))  # of an earlier save of this step, about to be replaced
        uploads = [
            pool.submit(store.upload, folder / path, f"{target}/{path}", on_progress, digest)
            for path, digest in digests.items()
        ]
        for upload in uploads:
            upload.result()
    store.write_bytes(store_manifest.manifest_path(target), manifest.to_bytes())
    try:
        _prune(store, newest=step, keep=keep)
    except StoreError as error:
        log.warning("Old checkpoints could not be deleted", error=str(error))


def newest(store: Store) -> StoreManifest | None:
    """Return the manifest of the newest checkpoint that has one; its files are not looked at."""
    return next((manifest for _, manifest in _whole(store)), None)


def resume(
    store: Store,
    folder_for: Callable[[int], Path],
    on_progress: OnProgress | None = None,
    check: Callable[[Path, int], object] = lambda folder, step: None,
) -> StoreManifest | None:
    """Restore the newest checkpoint that verifies (else the one before, …) to `folder_for` its step.

    `check` raises StoreCorrupted for the folder of a step that no run can go on from. Returns the manifest (`.step`
    says where the run goes on), None when there is nothing to resume from. A store that does not answer raises
    StoreUnavailable: it never passes for an older checkpoint or for none.
    """
    for step, manifest in _whole(store):
        try:
            _restore(store, step, manifest, folder_for(step), on_progress)
            check(folder_for(step), step)
        except (StoreCorrupted, StoreNotFound) as error:
            log.warning("A checkpoint is broken, trying the one before", step=step, error=str(error))
            shutil.rmtree(folder_for(step), ignore_errors=True)
        else:
            return manifest
    return None


def restore(store: Store, step: int, folder: Path, on_progress: OnProgress | None = None) -> StoreManifest:
    """Bring the checkpoint of `step` to `folder`, which is replaced; it appears whole or not at all.

    Every file is compared with the manifest's SHA-256. Raises StoreCorrupted, and StoreNotFound without a manifest.
    """
    source = folder_of(step)
    found = store_manifest.read(store, source)
    if found is None:
        raise StoreNotFound(f"{store.field}: {store.uri_of(source)} is no whole checkpoint: it has no manifest")
    _restore(store, step, found[0], folder, on_progress)
    return found[0]


def delete_all(store: Store, job: Job | None = None) -> None:
    """Remove every checkpoint, oldest first, so that an interruption leaves the best one to resume from.

    Those of a job with another name than `job` stay: several jobs may share a URI.
    """
    others = {step for step, manifest in _whole(store) if belongs_to_another(manifest, job)}
    for step in sorted(_steps(entry.path for entry in store.list()) - others):
        _delete(store, step)


def belongs_to_another(manifest: StoreManifest, job: Job | None) -> bool:
    """Whether the checkpoint is of a job with another name. A job that was created anew has the name, not the uid."""
    owner = manifest.job
    return owner is not None and job is not None and (owner.namespace, owner.name) != (job.namespace, job.name)


def _restore(store: Store, step: int, manifest: StoreManifest, folder: Path, on_progress: OnProgress | None) -> None:
    source = folder_of(step)
    partial = folder.with_name(f".{folder.name}.partial")
    with on_local_disk(f"{store.field}: {store.uri_of(source)}", folder.parent):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _download(store, source, manifest, partial, on_progress)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _download(store: Store, source: str, manifest: StoreManifest, folder: Path, on_progress: OnProgress | None) -> None:
    with _several_at_once() as pool:
        downloads = [
            pool.submit(store.download, f"{source}/{file.path}", folder / file.path, on_progress, file.sha256)
            for file in manifest.files
        ]
        for download in downloads:
            download.result()


@contextmanager
def _several_at_once() -> Iterator[ThreadPoolExecutor]:
    """Yield a pool for transfers; one that fails, or a signal, keeps those that wait from starting."""
    pool = ThreadPoolExecutor(_FILES_AT_ONCE)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _whole(store: Store) -> Iterator[tuple[int, StoreManifest]]:
    """Return the steps that have a readable manifest, newest first."""
    paths = {entry.path for entry in store.list()}
    for step in sorted(_steps(paths), reverse=True):
        if store_manifest.manifest_path(folder_of(step)) not in paths:
            continue
        try:
            found = store_manifest.read(store, folder_of(step))
        except StoreCorrupted as error:
            log.warning("A checkpoint's manifest is broken, trying the one before", step=step, error=str(error))
            continue
        if found is None or found[0].kind != "Checkpoint" or found[0].step != step:
            log.warning("What is stored as a checkpoint is none, trying the one before", step=step)
            continue
        yield step, found[0]


def _prune(store: Store, newest: int, keep: int) -> None:
    """Delete all but the `keep` newest whole checkpoints up to `newest`, which itself always stays.

    A step above `newest` was left by a run that did not get it whole, or that this one does not descend from.
    """
    paths = {entry.path for entry in store.list()}
    steps = _steps(paths)
    whole = {step for step in steps if step < newest and store_manifest.manifest_path(folder_of(step)) in paths}
    kept = {newest, *sorted(whole, reverse=True)[: max(keep, 1) - 1]}
    for step in sorted(steps - kept):
        _delete(store, step)


def _delete(store: Store, step: int) -> None:
    """Manifest first: from then on nobody takes the rest for a checkpoint."""
    store.delete(f"{folder_of(step)}/{constants.MANIFEST_FILE}")
    store.delete_prefix(folder_of(step))


def _steps(paths: Iterable[str]) -> set[int]:
    matches = (_FOLDER.fullmatch(path.split("/", 1)[0]) for path in paths)
    return {int(match[1]) for match in matches if match}
