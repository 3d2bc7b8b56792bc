"""`finetune suspend` and `finetune resume`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_api import constants
from finetune_cli.errors import CliError, same_place
from finetune_cli.options import (
    Context,
    IsSweep,
    JobName,
    Kubeconfig,
    Namespace,
    Output,
)
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_cli.kube.objects import Object


def suspend(
    name: JobName,
    sweep: IsSweep = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop a job, or all trials of a sweep, after a checkpoint, and free the GPUs.

    Examples:
        finetune suspend nli
        finetune suspend nli-rates --sweep
    """
    job, is_new = _set_suspend(name, True, sweep, namespace, context, kubeconfig)
    if output:
        console.structured_job(job, output)
        return
    where = job["metadata"]["namespace"]
    saves = "its trials save a checkpoint" if sweep else "it saves a checkpoint"
    told = f"is being suspended in namespace {where}: {saves} first"
    console.done(f"{name} {told if is_new else f'was told before to suspend, in namespace {where}'}")
    console.next_commands(f"finetune resume {name}{_flag(sweep)}{same_place(namespace, context, kubeconfig)}")


def resume(
    name: JobName,
    sweep: IsSweep = False,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Resume a suspended job from its checkpoint, or the trials of a suspended sweep from theirs.

    Examples:
        finetune resume nli
        finetune resume nli-rates --sweep
    """
    job, is_new = _set_suspend(name, False, sweep, namespace, context, kubeconfig)
    if output:
        console.structured_job(job, output)
        return
    told = "is resuming" if is_new else "is not suspended"
    console.done(f"{name} {told} in namespace {job['metadata']['namespace']}")
    console.next_commands(f"finetune watch {name}{_flag(sweep)}{same_place(namespace, context, kubeconfig)}")


def _flag(sweep: bool) -> str:
    return " --sweep" if sweep else ""


def _set_suspend(
    name: str, value: bool, sweep: bool, namespace: Any, context: Any, kubeconfig: Any
) -> tuple[Object, bool]:
    """Return the job or the sweep with spec.suspend at `value`, and whether that is new."""
    from finetune_cli.kube.connect import connect
    from finetune_cli.output.job_view import View
    from finetune_cli.output.sweep_page import SweepView

    cluster, kind = connect(namespace, context, kubeconfig), constants.SWEEP_KIND if sweep else constants.KIND
    found = cluster.get(name, kind)
    view = SweepView.of(found) if sweep else View.of(found)
    if view.is_over:
        raise CliError(f"{name} has ended ({view.phase}): there is nothing to {'suspend' if value else 'resume'}")
    if (found.get("spec") or {}).get("suspend", False) is value:
        return found, False
    return cluster.patch(name, {"spec": {"suspend": value}}, kind), True
