"""`finetune download`: an adapter, every file verified against its manifest, resuming after an interruption."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_api import constants
from finetune_cli import storage, target_folder
from finetune_cli.errors import CliError, Exit
from finetune_cli.options import (
    Context,
    Kubeconfig,
    Namespace,
    Output,
    complete_job,
)
from finetune_cli.output import console, formatting
from finetune_cli.target_folder import TargetFolder

if TYPE_CHECKING:
    from finetune_api.artifact_manifest import FileRecord, StoreManifest
    from finetune_trainer.stores.base import Store

#: Files fetched at the same time.
PARALLEL = 4
#: Tries of one file, each of which resumes where the last one broke off.
TRIES = 3


def download(
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|URI", help="A FineTuneJob, or where an adapter lies.", autocompletion=complete_job
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to put it in; made when it is not there.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another adapter in DIR.")] = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Fetch a published adapter and check every file's SHA-256.

    Files appear in DIR once all of them are whole and checked. Only files of an earlier download are replaced, never
    others, and nothing is written through links. Run it again after an interruption and it resumes where it stopped.
    Credentials for s3:// come from the environment or the profile, as with the aws command: AWS_ACCESS_KEY_ID,
    AWS_PROFILE, AWS_ENDPOINT_URL.

    Examples:
        finetune download nli ./nli
        finetune download s3://adapters/nli ./nli
    """
    address, digest = (source, None) if "://" in source else _of_job(source, namespace, context, kubeconfig)
    store = storage.open_store(address)
    with storage.store_errors():
        manifest, data = _read_manifest(store, address)
        if digest and digest != f"sha256:{hashlib.sha256(data).hexdigest()}":
            raise CliError(
                f"{address} no longer holds what {source} published: the digest of {constants.MANIFEST_FILE} differs",
                hint=f"to download what it holds now: finetune download {address} {folder}",
                code=Exit.CORRUPT,
            )
    target = TargetFolder(folder, manifest, data, overwrite)
    try:
        with storage.store_errors():
            _fetch_all(store, target)
    except CliError as error:
        if error.code == Exit.CORRUPT:
            target.discard()
        raise
    target.place()
    missing = target.missing
    if output:
        fetched = {file.path for file in missing}
        listed = [
            {"path": file.path, "sizeBytes": file.size_bytes, "sha256": file.sha256, "fetched": file.path in fetched}
            for file in manifest.files
        ]
        console.structured({"uri": address, "folder": str(folder), "files": listed}, output)
        return
    count, kept = len(manifest.files), len(manifest.files) - len(missing)
    already = f" ({kept} of them were already in {folder})" if kept else ""
    total = formatting.size(manifest.size_bytes)
    console.done(f"{count} files ({total}) downloaded to {folder}, all checksums verified{already}")


def _of_job(name: str, namespace: str | None, context: str | None, kubeconfig: Path | None) -> tuple[str, str]:
    """URI and manifest digest of a job's adapter."""
    from finetune_cli.kube.connect import connect
    from finetune_cli.output.job_view import View

    view = View.of(connect(namespace, context, kubeconfig).get(name))
    if view.status.adapter is None:
        raise CliError(
            f"{name} has published no adapter ({view.phase})",
            hint=f"finetune {'status' if view.is_over else 'watch'} {name}",
            code=Exit.JOB_FAILED if view.state == "failed" else Exit.INVALID,
        )
    return view.status.adapter.uri, view.status.adapter.manifest_digest


def _read_manifest(store: Store, address: str) -> tuple[StoreManifest, bytes]:
    """Return the manifest of the adapter in `store` and its bytes. Raises CliError, StoreError."""
    from finetune_trainer.stores import manifest

    found = manifest.read(store)
    if found is None:
        raise CliError(
            f"no complete adapter at {address}: {constants.MANIFEST_FILE}, which is written last, is missing"
        )
    if found[0].kind != "Adapter":
        raise CliError(f"{address} holds a {found[0].kind}, not an adapter")
    return found


def _fetch_all(store: Store, target: TargetFolder) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console.err(), transient=True) as progress:
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
