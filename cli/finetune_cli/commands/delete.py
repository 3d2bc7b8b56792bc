"""`finetune delete`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from finetune_cli.options import (
    Context,
    JobName,
    Kubeconfig,
    Namespace,
    Output,
)
from finetune_cli.output import console

if TYPE_CHECKING:
    pass


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
    from finetune_api.plain_text import one_line
    from finetune_cli.kube.connect import connect
    from finetune_cli.output.job_view import View

    cluster = connect(namespace, context, kubeconfig)
    job = cluster.get(name)
    view = View.of(job)
    if not view.is_over and not yes and console.out().is_terminal:
        typer.confirm(f"{name} has not ended ({one_line(view.phase)}). Delete it?", abort=True)
    cluster.delete(name)
    if output:
        console.structured_job(job, output)
        return
    console.done(f"{name} deleted from namespace {cluster.namespace}")
    if view.status.adapter:
        console.note(f"  The adapter stays at {view.status.adapter.uri}")
