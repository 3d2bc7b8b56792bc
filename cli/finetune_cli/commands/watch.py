"""`finetune watch`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from finetune_api import constants
from finetune_cli.errors import CliError, Exit, same_place
from finetune_cli.interrupts import insistent_interrupts
from finetune_cli.options import (
    Context,
    IsSweep,
    JobName,
    Kubeconfig,
    Namespace,
    Output,
    OutputFormat,
    duration,
)
from finetune_cli.output import console, formatting

if TYPE_CHECKING:
    from rich.console import RenderableType

    from finetune_cli.kube.client import Cluster
    from finetune_cli.kube.objects import Object
    from finetune_cli.kube.packed import SharedJob
    from finetune_cli.output.job_view import View
    from finetune_cli.output.sweep_page import SweepView

V = TypeVar("V", "View", "SweepView")
#: Seconds between two lists of a sweep's trials.
TRIALS_SECONDS = 5


def watch(
    name: JobName,
    sweep: IsSweep = False,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            metavar="DURATION",
            parser=duration,
            help="Give up after this long (90, 30m, 4h), with exit code 4.",
            show_default=False,
        ),
    ] = None,
    output: Output = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Watch a job, or a sweep, until it ends. Ctrl-C leaves it running.

    On a terminal the page of `finetune status` is kept up to date; elsewhere each change is a line, and with -o the
    whole job each time.

    Examples:
        finetune watch nli
        finetune watch nli --timeout 4h && finetune download nli ./nli
        finetune watch nli -o json | jq .status.progress
        finetune watch nli-rates --sweep

    Exit codes:
        0    the job, or the sweep, succeeded
        2    it failed
        3    the cluster is out of reach, or access is denied
        4    the wait timed out
        130  interrupted; the job keeps running
    """
    from finetune_cli.kube.connect import connect
    from finetune_cli.kube.packed import SharedJob

    cluster = connect(namespace, context, kubeconfig)
    if sweep:
        watch_sweep(cluster, name, timeout, output)
        return
    place = same_place(namespace, context, kubeconfig)
    try:
        watch_job(cluster, name, timeout, output, place)
    except SharedJob as shared:
        _watch_shared(cluster, shared, timeout, output, place)


def _watch_shared(
    cluster: Cluster, shared: SharedJob, timeout: float | None, output: OutputFormat | None, place: str
) -> None:
    """Watch the job that a trial shares; raises CliError where the trial has not succeeded by its end."""
    from finetune_cli.kube import packed

    if output:
        raise shared
    console.note(shared.message)
    watch_job(cluster, shared.trial.job_name, timeout, output, place)
    trial = packed.find(shared.trial.name, [cluster.get(shared.trial.job_name)])
    if trial and trial.row.phase != "Succeeded":
        raise CliError(f"trial {trial.trial} has published no adapter: {trial.standing}", code=Exit.JOB_FAILED)


def watch_job(
    cluster: Cluster, name: str, timeout: float | None, output: OutputFormat | None = None, place: str = ""
) -> None:
    """Show `name` until it has ended; returns when it succeeded, else raises CliError with the watch's exit code.

    `place` are the options that name its namespace and cluster, for the commands shown at the end.
    """
    from finetune_cli.output.next_steps import after_job

    with _left_running(name):
        if output:
            view = _follow_data(_states(cluster, name, timeout), output)
        elif console.out().is_terminal:
            view = _follow_live(cluster, name, timeout)
        else:
            view = _follow(cluster, name, timeout)
    if view.state == "failed":
        raise CliError(f"{name} failed: {view.why}", hint=view.cure, code=Exit.JOB_FAILED)
    if console.out().is_terminal and not output and (commands := after_job(view, place)):
        console.next_commands(*commands)


def watch_sweep(cluster: Cluster, name: str, timeout: float | None, output: OutputFormat | None) -> None:
    """Show a sweep until it has ended; raises CliError with the watch's exit code unless it succeeded."""
    with _left_running(name):
        states = _sweep_states(cluster, name, timeout)
        if output:
            view = _follow_data(states, output)
        elif console.out().is_terminal:
            view = _follow_sweep_live(cluster, states)
        else:
            view = _follow_sweep(states)
    if view.has_failed:
        raise CliError(f"{name} failed: {view.why}", code=Exit.JOB_FAILED)


@contextmanager
def _left_running(name: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        console.note(f"{name} keeps running in the cluster.")
        raise CliError("", code=Exit.INTERRUPTED) from None


def _follow_sweep(states: Iterator[tuple[Object, SweepView]]) -> SweepView:
    """Print a line for each change."""
    from finetune_cli.output.sweep_page import sweep_line

    said = ""
    with insistent_interrupts():
        for _, view in states:
            line = sweep_line(view, datetime.now(UTC))
            if line.partition("  ")[2] != said:
                said = line.partition("  ")[2]
                console.out().print(line, soft_wrap=True)
            if view.is_over:
                break
    return view


def _follow_sweep_live(cluster: Cluster, states: Iterator[tuple[Object, SweepView]]) -> SweepView:
    """Redraw the sweep's page; its trials' jobs are listed again every few seconds at most."""
    from rich.live import Live

    from finetune_cli.output.sweep_page import sweep_page

    shown: list[SweepView] = []
    trials: list[Object] = []
    listed = 0.0

    def draw() -> RenderableType:
        return sweep_page(shown[-1], trials, datetime.now(UTC)) if shown else ""

    with Live(console=console.out(), refresh_per_second=2, get_renderable=draw) as live, insistent_interrupts():
        for _, view in states:
            if view.is_over or time.monotonic() - listed > TRIALS_SECONDS:
                trials[:] = cluster.jobs(selector=f"{constants.LABEL_SWEEP}={view.name}").items
                listed = time.monotonic()
            shown[:] = [view]
            live.refresh()
            if view.is_over:
                break
    return view


def _follow(cluster: Cluster, name: str, timeout: float | None) -> View:
    """Print a line for each change."""
    from finetune_cli.output.pages import change_line

    said = ""
    with insistent_interrupts():
        for view in _views(cluster, name, timeout):
            line = change_line(view, datetime.now(UTC))
            if line.partition("  ")[2] != said:
                said = line.partition("  ")[2]
                console.out().print(line, soft_wrap=True)
            if view.is_over:
                break
    return view


def _follow_data(states: Iterator[tuple[Object, V]], output: OutputFormat) -> V:
    """Print the object after each change: JSON documents one after the other, YAML documents between lines of ---."""
    shown = None
    with insistent_interrupts():
        for job, view in states:
            if job != shown:
                if output == OutputFormat.YAML:
                    console.out().print("---")
                console.structured_job(job, output)
                shown = job
            if view.is_over:
                break
    return view


def _follow_live(cluster: Cluster, name: str, timeout: float | None) -> View:
    """Redraw the status page: times move on between changes too."""
    from rich.live import Live

    from finetune_cli.output.loss_history import loss_history
    from finetune_cli.output.pages import status_page

    losses: list[float] = []
    shown: list[View] = []
    last_step = -1
    live = Live(
        console=console.out(),
        refresh_per_second=2,
        get_renderable=lambda: status_page(shown[-1], datetime.now(UTC), losses) if shown else "",
    )
    # The interrupts' block is the inner one: it is left before Live puts the terminal in order.
    with live, insistent_interrupts():
        for view in _views(cluster, name, timeout):
            if not shown:
                losses.extend(loss_history(cluster, view))
            last_step = _remember(view, losses, last_step)
            shown[:] = [view]
            live.refresh()
            if view.is_over:
                break
    return view


def _remember(view: View, losses: list[float], last_step: int) -> int:
    """Add a new step's loss to the history; returns the last step seen."""
    progress = view.status.progress
    if progress is None or progress.loss is None or progress.step == last_step:
        return last_step
    losses.append(progress.loss)
    return progress.step


def _views(cluster: Cluster, name: str, timeout: float | None) -> Iterator[View]:
    return (view for _, view in _states(cluster, name, timeout))


def _states(cluster: Cluster, name: str, timeout: float | None) -> Iterator[tuple[Object, View]]:
    from finetune_cli.kube.operators import Lookout
    from finetune_cli.output.job_view import View

    lookout = Lookout(cluster)
    return ((job, View.of(job, lookout.reason(job))) for job in _objects(cluster, name, timeout, constants.KIND))


def _sweep_states(cluster: Cluster, name: str, timeout: float | None) -> Iterator[tuple[Object, SweepView]]:
    from finetune_cli.kube.operators import Lookout
    from finetune_cli.output.sweep_page import SweepView

    lookout = Lookout(cluster)
    return (
        (found, SweepView.of(found, lookout.reason(found)))
        for found in _objects(cluster, name, timeout, constants.SWEEP_KIND)
    )


def _objects(cluster: Cluster, name: str, timeout: float | None, kind: str) -> Iterator[Object]:
    deadline = time.monotonic() + timeout if timeout else None
    for found in cluster.follow(name, deadline, kind=kind, poll=_is_polled):
        if found is None:
            raise CliError(
                f"{name} was deleted while it was watched",
                hint="its checkpoints stay: the same manifest, submitted again, goes on from them",
            )
        yield found
    raise CliError(f"{name} has not ended within {formatting.duration(timeout or 0)}", code=Exit.TIMED_OUT)


def _is_polled(found: Object) -> bool:
    """Whether a look without a change tells more: of trials, or that no operator has come."""
    return found.get("kind") == constants.SWEEP_KIND or not found.get("status")
