"""`finetune download`: an adapter, every file verified against its manifest, resuming after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune_cli.errors import CliError, Exit
from finetune_cli.options import (
    Context,
    Kubeconfig,
    Namespace,
    Output,
    complete_job,
)
from finetune_cli.output import console, formatting
from finetune_cli.published import fetch_into, locate


def download(
    source: Annotated[
        str,
        typer.Argument(
            metavar="NAME|URI", help="A FineTuneJob, or where an adapter lies.", autocompletion=complete_job
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to put it in; made when it is not there.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another adapter in DIR.")] = False,
    digest: Annotated[
        str | None,
        typer.Option("--digest", metavar="SHA256", help="What its manifest must be, as sha256:….", show_default=False),
    ] = None,
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
    published = locate(source, namespace, context, kubeconfig, f"finetune download {{}} {folder}")
    if digest and digest != f"sha256:{published.digest}":
        raise CliError(
            f"{published.address} holds another adapter: its manifest is sha256:{published.digest}, not {digest}",
            code=Exit.CORRUPT,
        )
    target = fetch_into(folder, published, overwrite=overwrite)
    address, manifest = published.address, published.manifest
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
    if manifest.kind == "Adapter" and console.out().is_terminal:
        console.next_commands(f"finetune chat {_typed(folder)}")


def _typed(folder: Path) -> str:
    """Return a folder as a path that no job's name looks like."""
    return str(folder) if "/" in str(folder) else f"./{folder}"
