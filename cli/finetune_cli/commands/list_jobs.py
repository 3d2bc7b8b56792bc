"""`finetune list`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from finetune_api import constants
from finetune_cli.options import (
    Context,
    Kubeconfig,
    Namespace,
    Output,
)
from finetune_cli.output import console

if TYPE_CHECKING:
    pass


def list_jobs(
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="Of every namespace.")] = False,
    selector: Annotated[
        str | None, typer.Option("--selector", "-l", help="By labels, such as team=nlp.", show_default=False)
    ] = None,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="FineTuneSweeps instead.")] = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """List FineTuneJobs, newest first: how far they are, and why they wait.

    Examples:
        finetune list
        finetune list -A -l team=nlp
        finetune list --sweeps
        finetune list -l finetune.dev/sweep=nli      # the trials of one
        finetune list -o json | jq '.items[].status.metrics.evalLoss'
    """
    from finetune_cli.kube.connect import connect

    cluster = connect(namespace, context, kubeconfig)
    kind = constants.SWEEP_KIND if sweeps else constants.KIND
    listing = cluster.jobs(everywhere=everywhere, selector=selector, kind=kind)
    if listing.lost:
        console.note(f"{listing.lost} of the {'sweeps' if sweeps else 'jobs'} cannot be read, not even their names")
    found = sorted(listing.items, key=lambda job: job["metadata"].get("creationTimestamp", ""), reverse=True)
    if output:
        console.structured({"apiVersion": constants.API_VERSION, "kind": f"{kind}List", "items": found}, output)
        return
    if not found:
        console.note(f"No {kind}s" + ("." if everywhere else f" in namespace {cluster.namespace}."))
        return
    if sweeps:
        from finetune_cli.output.sweep_page import SweepView, sweep_table

        table = sweep_table([SweepView.of(each) for each in found], datetime.now(UTC), namespaces=everywhere)
        console.page(table, console.PIPED_TABLE_WIDTH)
        return
    from finetune_cli.output.job_view import View
    from finetune_cli.output.pages import job_table

    console.page(
        job_table([View.of(job) for job in found], datetime.now(UTC), namespaces=everywhere), console.PIPED_TABLE_WIDTH
    )
