"""`finetune suspend` and `finetune resume`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_cli.errors import CliError
from finetune_cli.options import (
    Context,
    JobName,
    Kubeconfig,
    Namespace,
    Output,
    same_place,
)
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_cli.kube.client import Object


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
    """Return the job with spec.suspend at `value`."""
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
