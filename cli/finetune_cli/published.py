"""A published adapter: where it lies, its manifest, and its files, each verified. `download` and `chat` use it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import constants
from finetune_cli import storage, target_folder
from finetune_cli.errors import CliError, Exit
from finetune_cli.manifests import job_name
from finetune_cli.output import console
from finetune_cli.target_folder import TargetFolder

if TYPE_CHECKING:
    from finetune_api.artifact_manifest import FileRecord, StoreManifest
    from finetune_cli.kube.client import Cluster
    from finetune_trainer.stores.base import Store
    from finetune_trainer.stores.latest import Found

#: Files fetched at the same time.
PARALLEL = 4
#: Tries of one file, each of which resumes where the last one broke off.
TRIES = 3
_NO_FOLDER = "there is no such folder"


@dataclass(frozen=True)
class Published:
    """An adapter in a store: `manifest` is its manifest, and `data` that manifest's bytes."""

    address: str
    store: Store
    manifest: StoreManifest
    data: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the digest of every file."""
        return hashlib.sha256(self.data).hexdigest()


def locate(
    source: str,
    namespace: str | None,
    context: str | None,
    kubeconfig: Path | None,
    instead: str,
    *,
    adapters_only: bool = False,
) -> Published:
    """Return the adapter of a job, or the one that lies at a URI, without its files.

    Args:
        source: A FineTuneJob's name, a URI, or a path of this machine, which holds a slash.
        namespace: Of the job.
        context: Of the kubeconfig.
        kubeconfig: The file.
        instead: What to run if the URI holds another adapter than the job published; {} stands for the URI.
        adapters_only: Whether what was made of an adapter, such as a merged model, is refused.

    Raises:
        CliError: There is none, it is out of reach, or not what the job published.
    """
    if "/" in source:
        return published_at(address_of(source), adapters_only=adapters_only)
    from finetune_cli.kube.connect import connect

    try:
        told = of_job(connect(namespace, context, kubeconfig), job_name(source, or_path=True))
    except CliError as error:
        if Path(source).is_dir():
            error.hint = f"the folder of this name is written ./{source}"
        raise
    found = published_at(told.uri, adapters_only=adapters_only)
    if differs := told.differs_from(found):
        raise CliError(
            f"{told.uri} no longer holds what {source} published: {differs}",
            hint=f"to take what it holds now: {instead.replace('{}', told.uri)}",
            code=Exit.CORRUPT,
        )
    return found


def address_of(source: str) -> str:
    """Return a URI as it is, and a path of this machine as one."""
    return source if "://" in source else f"file://{Path(source).resolve()}"


def published_at(address: str, *, adapters_only: bool = False) -> Published:
    """Return what lies at a URI, or what the latest.json there names, without its files; raises CliError."""
    store = storage.open_store(address)
    with storage.store_errors():
        from finetune_trainer.stores import latest
        from finetune_trainer.stores.signature import require_signature

        named = latest.find(store)
        if named is not None and named.path:
            address = store.uri_of(named.path)
            store = storage.open_store(address)
        found = Published(address, store, *_accepted(named, address, adapters_only))
        require_signature(found.data, store.uri_of(constants.MANIFEST_FILE), os.environ)
    return found


def fetch_into(folder: Path, published: Published, *, overwrite: bool = False) -> TargetFolder:
    """Make `folder` hold the adapter, every byte compared with its manifest; what is there already is kept."""
    target = TargetFolder(folder, published.manifest, published.data, overwrite)
    try:
        with storage.store_errors():
            _fetch_all(published.store, target)
    except CliError as error:
        if error.code == Exit.CORRUPT:
            target.discard()
        raise
    target.place()
    return target


@dataclass(frozen=True)
class Told:
    """What a cluster tells of an adapter: where it lies, and its manifest's digest, or the uid of a trial without."""

    uri: str
    digest: str | None = None
    uid: str | None = None

    def differs_from(self, found: Published) -> str:
        """Return what tells that `found` is another; empty where nothing does."""
        if self.digest and self.digest != f"sha256:{found.digest}":
            return f"the digest of {constants.MANIFEST_FILE} differs"
        owner = found.manifest.job.uid if found.manifest.job else None
        return f"{constants.MANIFEST_FILE} names another job" if self.uid and self.uid != owner else ""


def require_unchanged(published: Published) -> None:
    """Compare each file of an adapter in a folder of this machine with its manifest, whatever copy is kept of it.

    What lies elsewhere was compared when it was fetched. Raises CliError.
    """
    store = published.store
    if store.local_folder is None:
        return
    with storage.store_errors():
        for file in published.manifest.files:
            if (found := store.digest(file.path)).sha256 != file.sha256:
                raise _corrupt(store, file, f"has SHA-256 {found.sha256}, but its manifest says {file.sha256}")


def of_job(cluster: Cluster, name: str) -> Told:
    """Return what the cluster tells of a job's adapter. Raises CliError if it has published none."""
    from finetune_cli.kube.packed import SharedJob
    from finetune_cli.output.job_view import View

    try:
        view = View.of(cluster.get(name))
    except SharedJob as shared:
        if shared.trial.row.phase != "Succeeded":
            raise
        return Told(shared.trial.uri, uid=shared.trial.uid)
    if view.status.adapter is None and (candidate := view.status.candidate):
        raise CliError(
            f"{name} has published no adapter: it did not meet publish.onlyIf ({view.why})",
            hint=f"what it trained is kept at {candidate.uri}",
        )
    if view.status.adapter is None:
        raise CliError(
            f"{name} has published no adapter ({view.phase})",
            hint=f"finetune {'status' if view.is_over else 'watch'} {name}{cluster.options}",
            code=Exit.JOB_FAILED if view.state == "failed" else Exit.INVALID,
        )
    return Told(view.status.adapter.uri, view.status.adapter.manifest_digest)


def _accepted(found: Found | None, address: str, adapters_only: bool) -> tuple[StoreManifest, bytes]:
    """Return the manifest that was found at `address` and its bytes. Raises CliError if it is none to read."""
    if found is None and address.startswith("file://") and not Path(address.removeprefix("file://")).is_dir():
        is_file = Path(address.removeprefix("file://")).exists()
        raise CliError(
            f"no complete adapter at {address}: {'it is a file, an adapter is a folder' if is_file else _NO_FOLDER}",
            hint="finetune list shows the jobs of a cluster; an adapter's place is a folder, s3:// or file://",
        )
    if found is None:
        raise CliError(
            f"no complete adapter at {address}: {constants.MANIFEST_FILE}, which is written last, is missing",
            hint="give the output.uri of a job that has succeeded, or a prefix with a promoted adapter",
        )
    if found.manifest.kind == "Checkpoint" or (adapters_only and found.manifest.kind != "Adapter"):
        raise CliError(f"{address} holds a {found.manifest.kind}, not an adapter")
    return found.manifest, found.data


def _fetch_all(store: Store, target: TargetFolder) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console.err(), transient=True, disable=not console.err().is_terminal
    ) as progress:
        task = progress.add_task("Downloading", total=sum(file.size_bytes for file in target.missing))

        def advance(count: int) -> None:
            progress.advance(task, count)

        with ThreadPoolExecutor(PARALLEL) as pool:
            pending = [pool.submit(fetch, store, file, target.part(file), advance) for file in target.missing]
            try:
                for each in pending:
                    each.result()
            except BaseException:
                for each in pending:
                    each.cancel()
                raise


def fetch(store: Store, file: FileRecord, part: Path, advance: Callable[[int], None]) -> None:
    """Download one file to `part`, resuming a few times when the connection breaks. Raises CliError, StoreError."""
    from finetune_trainer.stores.errors import StoreUnavailable

    counted = 0

    def count(number: int) -> None:
        nonlocal counted
        counted += number
        advance(number)

    for tries_left in range(TRIES - 1, -1, -1):
        try:
            _fetch(store, file, part, count)
            return
        except StoreUnavailable:
            if not tries_left:
                raise
            advance(-counted)
            counted = 0


def _fetch(store: Store, file: FileRecord, part: Path, advance: Callable[[int], None]) -> None:
    """Download one file, resuming an earlier, unfinished try of the same content. Never takes more than its size."""
    try:
        if part.exists() and part.stat().st_size > file.size_bytes:
            part.unlink()
        digest = target_folder.digest_of(part) if part.exists() else hashlib.sha256()
        size = part.stat().st_size if part.exists() else 0
        advance(size)
        with part.open("ab") as output:
            # At the end already: a store refuses a range that starts there.
            for chunk in store.stream(file.path, size) if size < file.size_bytes or not file.size_bytes else ():
                size += len(chunk)
                if size > file.size_bytes:
                    raise _corrupt(store, file, f"has more than the {file.size_bytes:,} bytes that its manifest says")
                output.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
    except OSError as error:
        raise CliError(f"{part}: cannot be written: {error.strerror}") from None
    if size != file.size_bytes:
        raise _corrupt(store, file, f"has {size:,} bytes, but its manifest says {file.size_bytes:,}")
    if digest.hexdigest() != file.sha256:
        raise _corrupt(store, file, f"has SHA-256 {digest.hexdigest()}, but its manifest says {file.sha256}")


def _corrupt(store: Store, file: FileRecord, how: str) -> CliError:
    hint = "it was changed or damaged after publishing; nothing was written"
    return CliError(f"{store.uri_of(file.path)} {how}", hint=hint, code=Exit.CORRUPT)
