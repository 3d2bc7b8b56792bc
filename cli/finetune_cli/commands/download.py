"""`finetune download`: an adapter, every byte checked against its manifest, going on where it was cut off."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_api import constants
from finetune_cli.errors import CliError, Exit
from finetune_cli.options import (
    Context,
    Kubeconfig,
    Namespace,
    Output,
    complete_job,
)
from finetune_cli.output import console, formatting

if TYPE_CHECKING:
    from finetune_cli.stores import Remote

#: Files fetched at the same time.
PARALLEL = 4
#: Times one file is taken up, beside the client's own retries.
TRIES = 3


@dataclass(frozen=True)
class File:
    """A file of an adapter, as its manifest names it."""

    path: str
    size: int
    sha256: str


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

    Run it again after an interruption and it goes on where it stopped. Credentials for s3:// come from the
    environment or the profile, as with the aws command: AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL.

    Examples:
        finetune download nli ./nli
        finetune download s3://adapters/nli ./nli
    """
    from finetune_cli.stores import open_remote

    address, digest = (source, None) if "://" in source else _of_job(source, namespace, context, kubeconfig)
    remote = open_remote(address)
    data = _manifest(remote, address)
    if digest and digest != f"sha256:{hashlib.sha256(data).hexdigest()}":
        raise CliError(
            f"{address} no longer holds what {source} published: the digest of {constants.MANIFEST_FILE} differs",
            hint=f"to take what is there now: finetune download {address} {folder}",
            code=Exit.CORRUPT,
        )
    files = parse_manifest(data, address)
    _prepare(folder, data, overwrite)
    missing = [file for file in files if not _is_here(folder / file.path, file)]
    _fetch_all(remote, missing, folder)
    (folder / constants.MANIFEST_FILE).write_bytes(data)
    if output:
        fetched = {file.path for file in missing}
        listed = [
            {"path": f.path, "sizeBytes": f.size, "sha256": f.sha256, "fetched": f.path in fetched} for f in files
        ]
        console.structured({"uri": address, "folder": str(folder), "files": listed}, output)
        return
    total = formatting.size(sum(file.size for file in files))
    kept = f", {len(files) - len(missing)} of them were here already" if len(missing) < len(files) else ""
    console.done(f"{len(files)} files, {total}, in {folder}: every digest is right{kept}")


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


def _manifest(remote: Remote, address: str) -> bytes:
    from finetune_cli.stores import MissingError

    try:
        return remote.read(constants.MANIFEST_FILE)
    except MissingError:
        raise CliError(
            f"there is no whole adapter at {address}: {constants.MANIFEST_FILE}, which is written last, is missing"
        ) from None


def parse_manifest(data: bytes, address: str) -> list[File]:
    """The files an adapter's manifest names. Raises CliError for anything else, and for paths that lead elsewhere."""
    from pydantic import BaseModel, Field, ValidationError

    class Record(BaseModel):
        path: str
        sizeBytes: int = Field(ge=0)  # noqa: N815 (as in the file)
        sha256: str = Field(pattern="^[0-9a-f]{64}$")

    class Manifest(BaseModel):
        kind: str
        files: list[Record]

    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "JSON"
        raise CliError(
            f"{address}: {constants.MANIFEST_FILE} is damaged: {field}: {first['msg']}", code=Exit.CORRUPT
        ) from None
    if manifest.kind != "Adapter":
        raise CliError(f"{address} holds a {manifest.kind}, not an adapter")
    for record in manifest.files:
        if not is_safe(record.path):
            raise CliError(
                f"{address}: {constants.MANIFEST_FILE} names a path outside: {record.path!r}", code=Exit.CORRUPT
            )
    return [File(record.path, record.sizeBytes, record.sha256) for record in manifest.files]


def is_safe(path: str) -> bool:
    """Whether `path` stays below the folder it is joined to, and leaves the manifest alone. Pure."""
    parts = path.split("/")
    strange = "\\" in path or "\0" in path or PurePosixPath(path).is_absolute()
    return not strange and all(part not in ("", ".", "..") for part in parts) and path != constants.MANIFEST_FILE


def _prepare(folder: Path, data: bytes, overwrite: bool) -> None:
    """Make the folder; refuse one that holds another adapter. From here until the end it holds no manifest."""
    here = folder / constants.MANIFEST_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if here.exists() and here.read_bytes() != data and not overwrite:
            raise CliError(f"{folder} holds another adapter", hint="choose another folder, or add --overwrite")
        here.unlink(missing_ok=True)
    except OSError as error:
        raise CliError(f"{folder}: cannot be written: {error.strerror}") from None


def _is_here(local: Path, file: File) -> bool:
    return local.is_file() and local.stat().st_size == file.size and _digest(local).hexdigest() == file.sha256


def _digest(path: Path) -> hashlib._Hash:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256")


def _fetch_all(remote: Remote, files: list[File], folder: Path) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console.err(), transient=True) as progress:
        task = progress.add_task("Downloading", total=sum(file.size for file in files))

        def advance(count: int) -> None:
            progress.advance(task, count)

        with ThreadPoolExecutor(PARALLEL) as pool:
            pending = [pool.submit(fetch, remote, file, folder / file.path, advance) for file in files]
            try:
                for each in pending:
                    each.result()
            except BaseException:
                for each in pending:
                    each.cancel()
                raise


def fetch(remote: Remote, file: File, local: Path, advance: Callable[[int], None]) -> None:
    """Fetch one file; a connection that is cut is taken up again a few times. Raises CliError."""
    counted = 0

    def count(number: int) -> None:
        nonlocal counted
        counted += number
        advance(number)

    for tries_left in range(TRIES - 1, -1, -1):
        try:
            _fetch(remote, file, local, count)
            return
        except CliError as error:
            if not error.may_pass or not tries_left:
                raise
            advance(-counted)
            counted = 0


def _fetch(remote: Remote, file: File, local: Path, advance: Callable[[int], None]) -> None:
    """Fetch one file, going on from an earlier, unfinished try of the same content."""
    part = local.with_name(f".{local.name}.{file.sha256[:16]}.part")
    try:
        local.parent.mkdir(parents=True, exist_ok=True)
        if part.exists() and part.stat().st_size > file.size:
            part.unlink()
        digest = _digest(part) if part.exists() else hashlib.sha256()
        start = part.stat().st_size if part.exists() else 0
        advance(start)
        with part.open("ab") as output:
            # At the end already: a range that starts there would be refused.
            for chunk in remote.stream(file.path, start) if start < file.size or not file.size else ():
                output.write(chunk)
                digest.update(chunk)
                advance(len(chunk))
        if digest.hexdigest() != file.sha256:
            part.unlink()
            raise CliError(
                f"{remote.root.join(file.path)} is not what its manifest says: SHA-256 {digest.hexdigest()}, not"
                f" {file.sha256}",
                hint="it was changed or damaged after publishing",
                code=Exit.CORRUPT,
            )
        part.replace(local)
    except OSError as error:
        raise CliError(f"{local}: cannot be written: {error.strerror}") from None
