"""Fetch a model, a data set or an adapter from any scheme: one function."""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Final

from filelock import FileLock

from finetune_api import artifact_manifest, constants
from finetune_api.uri import Uri
from finetune_trainer.stores import fsync, manifest
from finetune_trainer.stores.base import Entry, OnProgress, Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import (
    StoreCorrupted,
    StoreNotFound,
    StoreUnavailable,
    on_local_disk,
)
from finetune_trainer.stores.open import open_store

_FILES_AT_ONCE: Final = 4


def fetch(
    uri: Uri,
    credentials: Credentials,
    dest: Path,
    on_progress: OnProgress | None = None,
    *,
    revision: str | None = None,
    ignore: Sequence[str] = (),
    field: str | None = None,
    env: Mapping[str, str] | None = None,
) -> Path:
    """Make what `uri` names available on this machine and return its path.

    pvc:// and file:// are used in place. Everything else is downloaded to a cache that jobs may share: a finished
    download appears whole by a rename, a second job waits for it, a killed one is resumed, changed objects are fetched
    again.

    Args:
        uri: A file, a prefix or a repository.
        credentials: Of the role that it is fetched for.
        dest: The cache.
        on_progress: Told of bytes as they arrive.
        revision: Branch, tag or commit of a hub repository.
        ignore: Shell patterns of paths to leave out.
        field: The manifest's field to name in messages; default: the role's.
        env: Says where claims are mounted; default: the process's environment.

    Returns:
        A file, or a folder if `uri` is a prefix or a repository.

    Raises:
        StoreError: It does not exist, cannot be read or arrives corrupted, or the disk is full.
    """
    if uri.scheme == "hf":
        from finetune_trainer.stores.hub import fetch_from_hub

        return fetch_from_hub(
            uri, credentials, dest / "hub", on_progress, revision=revision, ignore=ignore, field=field
        )
    store = open_store(uri, credentials, field=field, env=env)
    if store.local_folder is not None:
        if not store.exists("") and not store.local_folder.is_dir():
            raise StoreNotFound(f"{store.field}: {store.root} does not exist")
        return store.local_folder
    is_file = not uri.path.endswith("/") and uri.path != "" and store.exists("")
    entries = [Entry("", store.size(""))] if is_file else _wanted(store, ignore)
    return _through_cache(store, entries, dest / uri.scheme, on_progress)


def _wanted(store: Store, ignore: Sequence[str]) -> list[Entry]:
    """Return the objects below a prefix; refuse keys that would lead out of the folder that they are written to."""
    listed = store.list()
    entries = [entry for entry in listed if not any(fnmatch(entry.path, pattern) for pattern in ignore)]
    if not entries:
        found = "only files that are not used here" if listed else "neither an object nor a prefix: check its spelling"
        raise StoreNotFound(f"{store.field}: {store.root} is {found}")
    for entry in entries:
        if fault := artifact_manifest.fault_of_path(entry.path):
            raise StoreNotFound(f"{store.field}: {store.root} contains an unsafe object key: {entry.path!r} {fault}")
    return entries


def _through_cache(store: Store, entries: list[Entry], cache: Path, on_progress: OnProgress | None) -> Path:
    """Return the folder (or file) in `cache` with exactly these objects and versions; download what is missing."""
    identity = json.dumps([str(store.root), [[entry.path, entry.size, entry.version] for entry in entries]])
    key = hashlib.sha256(identity.encode()).hexdigest()[:32]
    name = PurePosixPath(store.root.path).name or store.root.authority
    with on_local_disk(f"{store.field}: {store.root}", cache):
        if (cache / key).is_dir():
            return cache / key / name
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{key}.lock") as is_alone:
            partial = cache / (f"{key}.partial" if is_alone else f"{key}.{uuid.uuid4().hex}.partial")
            if not (cache / key).is_dir():
                _require_space(store, entries, cache)
                _download(store, entries, partial / name, on_progress)
                _place(partial, cache / key)
    return cache / key / name


def _download(store: Store, entries: list[Entry], target: Path, on_progress: OnProgress | None) -> None:
    digests = _known_digests(store, entries)

    def one(entry: Entry) -> None:
        local = target / entry.path if entry.path else target
        # From an earlier run: a file gets its name once it is checked and on disk, in a folder named for its version.
        if local.is_file() and local.stat().st_size == entry.size:
            if on_progress is not None:
                on_progress(entry.size)
            return
        store.download(entry.path, local, on_progress, digests.get(entry.path))

    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        list(pool.map(one, entries))


def _known_digests(store: Store, entries: list[Entry]) -> dict[str, str]:
    """Return the SHA-256 of each path if the prefix is a publication of ours."""
    if not any(entry.path == constants.MANIFEST_FILE for entry in entries):
        return {}
    try:
        found = manifest.read(store)
    except StoreCorrupted:  # somebody else's manifest.json
        return {}
    return {file.path: file.sha256 for file in found[0].files} if found else {}


def _require_space(store: Store, entries: list[Entry], folder: Path) -> None:
    needed, free = sum(entry.size for entry in entries), shutil.disk_usage(folder).free
    if needed > free:
        raise StoreUnavailable(
            f"{store.field}: {store.root} needs {needed / 2**30:.1f} GiB, {folder} has {free / 2**30:.1f} GiB free:"
            " enlarge the cache volume or the scratch space"
        )


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock (the kernel drops it when the process dies); yield False where the file system has none."""
    lock = FileLock(path)
    try:
        lock.acquire()
    except (NotImplementedError, OSError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _place(partial: Path, target: Path) -> None:
    fsync.sync_folders(partial)
    try:
        partial.rename(target)
        fsync.sync_folder(target.parent)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(partial, ignore_errors=True)  # another job, without locks, was first with the same content
