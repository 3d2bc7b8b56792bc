"""`finetune status` and `finetune watch`."""

from __future__ import annotations

from datetime import UTC, datetime

from finetune_api import constants
from finetune_cli.errors import same_place
from finetune_cli.options import (
    Context,
    IsSweep,
    JobName,
    Kubeconfig,
    Namespace,
    Output,
)
from finetune_cli.output import console


def status(
    name: JobName,
    sweep: IsSweep = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show how a job is doing: progress, loss, attempts, and why it waits or failed and what to do.

    Examples:
        finetune status nli
        finetune status --sweep nli-rates
        finetune status nli -o json | jq -r .status.adapter.uri
    """
    from finetune_cli.kube.connect import connect
    from finetune_cli.kube.operators import Lookout
    from finetune_cli.kube.packed import SharedJob

    cluster = connect(namespace, context, kubeconfig)
    lookout = Lookout(cluster)
    try:
        job = cluster.get(name, constants.SWEEP_KIND if sweep else constants.KIND)
    except SharedJob as shared:
        if output:  # a program would take the job's adapter for the trial's
            raise
        job = shared.trial.job
        console.out().print(shared.message, soft_wrap=True)
        console.out().print()
    if output:
        console.structured_job(job, output)
        return
    if sweep:
        from finetune_cli.output.sweep_page import SweepView, sweep_page

        trials = cluster.jobs(selector=f"{constants.LABEL_SWEEP}={name}").items
        console.page(
            sweep_page(SweepView.of(job, lookout.reason(job)), trials, datetime.now(UTC)), console.PIPED_TABLE_WIDTH
        )
        return
    from finetune_cli.output.job_view import View
    from finetune_cli.output.loss_history import loss_history
    from finetune_cli.output.next_steps import after_job
    from finetune_cli.output.pages import status_page

    view = View.of(job, lookout.reason(job))
    console.page(status_page(view, datetime.now(UTC), loss_history(cluster, view)), console.PIPED_TABLE_WIDTH)
    commands = after_job(view, same_place(namespace, context, kubeconfig))
    if commands and console.out().is_terminal:
        console.next_commands(*commands)
