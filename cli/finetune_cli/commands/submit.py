"""`finetune submit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_api import constants
from finetune_cli.errors import CliError, same_place
from finetune_cli.kube.changes import changed_paths
from finetune_cli.options import (
    Context,
    Kubeconfig,
    ManifestFile,
    Namespace,
    Output,
    Overrides,
)
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_api.manifest import Document
    from finetune_cli.kube.objects import Object

#: More changed fields are counted, not named.
MOST_NAMED = 8


def submit(
    file: ManifestFile,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Submit under another name, for a variant.", show_default=False)
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay and watch it train.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Take over fields that something else has set.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Let the cluster check it, and change nothing.")] = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Create a FineTuneJob or FineTuneSweep in the cluster, or change one (server-side apply).

    The manifest is checked here first. Once training has begun, only suspend, ttlSecondsAfterFinished,
    activeDeadlineSeconds and recovery may change; of a sweep that has started also parallelism, and no trial.

    Examples:
        finetune submit job.yaml
        finetune submit job.yaml --watch
        finetune submit sweep.yaml
        finetune submit job.yaml --name nli-rank32 --set lora.rank=32 --set output.uri=s3://adapters/{name}
    """
    from finetune_api import manifest
    from finetune_api.sweep import FineTuneSweep
    from finetune_cli.client import refuse_shared_output
    from finetune_cli.kube.connect import connect
    from finetune_cli.manifests import refused, the_job

    _, document = the_job(file, or_sweep=True)
    if name and isinstance(document.data, dict) and isinstance(document.data.get("metadata"), dict):
        document.data["metadata"]["name"] = name
    try:
        # No base folder: a path of this machine means nothing to the cluster.
        check = manifest.check_sweep if document.is_sweep else manifest.check
        job = check(document, None, overrides or ())
    except manifest.ManifestError as error:
        raise refused(error) from None
    if namespace and job.metadata.namespace and namespace != job.metadata.namespace:
        raise CliError(f"{file} is for namespace {job.metadata.namespace!r}, --namespace says {namespace!r}")
    cluster = connect(namespace or job.metadata.namespace, context, kubeconfig)
    if not isinstance(job, FineTuneSweep):  # the operator looks at each trial's output
        refuse_shared_output(cluster, job)
    kind = constants.SWEEP_KIND if document.is_sweep else constants.KIND
    before = None if output else cluster.before(job.metadata.name, kind)
    result, is_new = cluster.apply(_without_status(document), dry_run=dry_run, force=force)
    metadata = result["metadata"]
    if not output:
        verb, changed = ("created", "") if is_new else _told(before, result)
        place = f"in namespace {cluster.namespace}{' (dry run)' if dry_run else ''}"
        console.done(f"{metadata['name']} {verb} {place}{changed}")
    if watch and not dry_run:
        from finetune_cli.commands.watch import watch_job, watch_sweep

        if document.is_sweep:
            watch_sweep(cluster, metadata["name"], timeout=None, output=output)
            return
        place = same_place(namespace or job.metadata.namespace, context, kubeconfig)
        watch_job(cluster, metadata["name"], timeout=None, output=output, place=place)
    elif output:
        console.structured_job(result, output)
    elif not dry_run:
        place = same_place(namespace or job.metadata.namespace, context, kubeconfig)
        flag, other = ("--sweep ", "status --sweep") if document.is_sweep else ("", "logs -f")
        console.next_commands(
            f"finetune watch {flag}{metadata['name']}{place}", f"finetune {other} {metadata['name']}{place}"
        )


def _told(before: Object | None, after: Object) -> tuple[str, str]:
    """Return what became of an object that was there, and which of its fields are others. Pure."""
    if before is None:  # it could not be read
        return "applied", ""
    if not (paths := changed_paths(before, after)):
        return "unchanged", ""
    more = f" and {len(paths) - MOST_NAMED} more" if len(paths) > MOST_NAMED else ""
    return "changed", f": {', '.join(paths[:MOST_NAMED])}{more}"


def _without_status(document: Document) -> dict[str, Any]:
    return {key: value for key, value in document.data.items() if key != "status"}
