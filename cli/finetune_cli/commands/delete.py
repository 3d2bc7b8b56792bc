"""`finetune delete`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune_api import constants
from finetune_cli.options import (
    Context,
    IsSweep,
    JobName,
    Kubeconfig,
    Namespace,
    Output,
)
from finetune_cli.output import console


def delete(
    name: JobName,
    sweep: IsSweep = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Delete a job, or a sweep with its jobs, and the pods. Published adapters stay where they are.

    On a terminal it asks first when the job is still running.

    Examples:
        finetune delete nli
        finetune delete nli-rates --sweep
    """
    from finetune_api.plain_text import one_line
    from finetune_cli.kube.connect import connect
    from finetune_cli.output.job_view import View
    from finetune_cli.output.sweep_page import SweepView

    cluster, kind = connect(namespace, context, kubeconfig), constants.SWEEP_KIND if sweep else constants.KIND
    job = cluster.get(name, kind)
    view = SweepView.of(job) if sweep else View.of(job)
    if not view.is_over and not yes and console.out().is_terminal:
        typer.confirm(f"{name} has not ended ({one_line(view.phase)}). Delete it?", abort=True)
    cluster.delete(name, kind)
    if output:
        console.structured_job(job, output)
        return
    console.done(f"{name} deleted from namespace {cluster.namespace}")
    if isinstance(view, SweepView):
        if view.status.counts.succeeded:
            console.note(f"  {view.status.counts.succeeded} published adapters stay where they are")
    elif view.status.adapter:
        console.note(f"  The adapter stays at {view.status.adapter.uri}")
