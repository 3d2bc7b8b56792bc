"""`finetune submit`, `list`, `suspend`, `resume` and `delete`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_api import constants
from finetune_cli.errors import CliError
from finetune_cli.options import (
    Context,
    JobName,
    Kubeconfig,
    ManifestFile,
    Namespace,
    Output,
    Overrides,
    same_place,
)
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_api.manifest import Document
    from finetune_cli.kube.client import Object


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
    """Create a FineTuneJob in the cluster, or change one (server-side apply).

    The manifest is checked here first. Once training has begun, only suspend, ttlSecondsAfterFinished,
    activeDeadlineSeconds and recovery may change.

    Examples:
        finetune submit job.yaml
        finetune submit job.yaml --watch
        finetune submit job.yaml --name nli-rank32 --set lora.rank=32 --set output.uri=s3://adapters/nli-rank32
    """
    from finetune_api import manifest
    from finetune_cli.kube.connect import connect
    from finetune_cli.manifests import refused, the_job

    _, document = the_job(file)
    if name and isinstance(document.data, dict) and isinstance(document.data.get("metadata"), dict):
        document.data["metadata"]["name"] = name
    try:
        # No base folder: a path of this machine means nothing to the cluster.
        job = manifest.check(document, None, overrides or ())
    except manifest.ManifestError as error:
        raise refused(error) from None
    if namespace and job.metadata.namespace and namespace != job.metadata.namespace:
        raise CliError(f"{file} is for namespace {job.metadata.namespace!r}, --namespace says {namespace!r}")
    cluster = connect(namespace or job.metadata.namespace, context, kubeconfig)
    result, is_new = cluster.apply(_without_status(document), dry_run=dry_run, force=force)
    metadata = result["metadata"]
    verb = "created" if is_new else "applied"
    if not output:
        console.done(f"{metadata['name']} {verb} in namespace {cluster.namespace}{' (dry run)' if dry_run else ''}")
    if watch and not dry_run:
        from finetune_cli.commands.status import watch_job

        watch_job(cluster, metadata["name"], timeout=None, output=output)
    elif output:
        console.structured_job(result, output)
    elif not dry_run:
        option = f" -n {namespace}" if namespace else ""
        console.next_commands(
            f"finetune watch {metadata['name']}{option}", f"finetune logs -f {metadata['name']}{option}"
        )


def _without_status(document: Document) -> dict[str, Any]:
    return {key: value for key, value in document.data.items() if key != "status"}


def list_jobs(
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of every namespace.")] = False,
    selector: Annotated[
        str | None, typer.Option("--selector", "-l", help="By labels, such as team=nlp.", show_default=False)
    ] = None,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List FineTuneJobs, newest first: how far they are, and why they wait.

    Examples:
        finetune list
        finetune list -A -l team=nlp
        finetune list -o json | jq '.items[].status.metrics.evalLoss'
    """
    from finetune_cli.kube.connect import connect

    cluster = connect(namespace, context, kubeconfig)
    found = cluster.jobs(everywhere=everywhere, selector=selector)
    found.sort(key=lambda job: job["metadata"].get("creationTimestamp", ""), reverse=True)
    if output:
        console.structured(
            {"apiVersion": constants.API_VERSION, "kind": f"{constants.KIND}List", "items": found}, output
        )
        return
    if not found:
        console.note("No FineTuneJobs" + ("." if everywhere else f" in namespace {cluster.namespace}."))
        return
    from finetune_cli.output.job_view import View
    from finetune_cli.output.pages import job_table

    console.page(
        job_table([View.of(job) for job in found], datetime.now(UTC), namespaces=everywhere), console.PIPED_TABLE_WIDTH
    )


def suspend(
    name: JobName,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop a job after a checkpoint, and free its GPUs.

    Examples:
        finetune suspend nli
    """
    job = _set_suspend(name, True, namespace, context, kubeconfig)
    if output:
        console.structured_job(job, output)
        return
    where = job["metadata"]["namespace"]
    console.done(f"{name} is being suspended in namespace {where}: it saves a checkpoint first")
    console.next_commands(f"finetune resume {name}{same_place(namespace, context)}")


def resume(
    name: JobName,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Resume a suspended job from its checkpoint.

    Examples:
        finetune resume nli
    """
    job = _set_suspend(name, False, namespace, context, kubeconfig)
    if output:
        console.structured_job(job, output)
        return
    console.done(f"{name} is resuming in namespace {job['metadata']['namespace']}")
    console.next_commands(f"finetune watch {name}{same_place(namespace, context)}")


def _set_suspend(name: str, value: bool, namespace: Any, context: Any, kubeconfig: Any) -> Object:
    """The job with spec.suspend at `value`."""
    from finetune_cli.kube.connect import connect
    from finetune_cli.output.job_view import View

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.get(name)
    view = View.of(job)
    if view.is_over:
        raise CliError(f"{name} has ended ({view.phase}): there is nothing to {'suspend' if value else 'resume'}")
    if view.spec.get("suspend", False) is value:
        return job
    return cluster.patch(name, {"spec": {"suspend": value}})


def delete(
    name: JobName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete a job and its pods. A published adapter stays where it is.

    On a terminal it asks first when the job is still running.

    Examples:
        finetune delete nli
    """
    from finetune_cli.kube.connect import connect
    from finetune_cli.output.job_view import View

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.get(name)
    view = View.of(job)
    if not view.is_over and not yes and console.out().is_terminal:
        typer.confirm(f"{name} has not ended ({view.phase}). Delete it?", abort=True)
    cluster.delete(name)
    if output:
        console.structured_job(job, output)
        return
    console.done(f"{name} deleted from namespace {cluster.namespace}")
    if view.status.adapter:
        console.note(f"  The adapter stays at {view.status.adapter.uri}")
