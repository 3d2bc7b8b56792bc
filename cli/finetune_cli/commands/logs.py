"""`finetune logs`: from the pod while there is one, from the store afterwards."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune_api import constants, log_lines
from finetune_cli import storage
from finetune_cli.errors import CliError, Exit
from finetune_cli.interrupts import insistent_interrupts
from finetune_cli.options import (
    Context,
    JobName,
    Kubeconfig,
    Namespace,
)
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_cli.kube.client import Cluster
    from finetune_cli.kube.objects import Object
    from finetune_cli.output.job_view import View

LOG_FILE = f"{constants.TRAINING_DIR}/log.txt"
#: Of a log in a store, no more than this is shown.
MAX_LOG_BYTES = 64 << 20
_LEVELS = {"warning": "yellow", "error": "red", "critical": "red"}


def logs(
    name: JobName,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as lines are written, until the job ends.")
    ] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", min=0, metavar="LINES", help="Only the last lines.", show_default=False)
    ] = None,
    attempt: Annotated[
        int | None,
        typer.Option("--attempt", min=1, metavar="N", help="Of this attempt. Default: the newest.", show_default=False),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="JSON lines as the trainer writes them.")] = False,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print the trainer's log: from its pod, or from the store when the pod is gone.

    With -f it waits for a pod that has not started, goes from one attempt to the next, and ends with the job: exit
    code 0 when it succeeded, 2 when it failed.

    Examples:
        finetune logs nli
        finetune logs -f nli
        finetune logs nli --attempt 1 --tail 20
        finetune logs nli --raw | jq .event
    """
    from finetune_cli.kube import objects
    from finetune_cli.kube.connect import connect
    from finetune_cli.kube.packed import SharedJob
    from finetune_cli.output.job_view import View

    cluster, trial = connect(namespace, context, kubeconfig), None
    try:
        view = View.of(cluster.get(name))
    except SharedJob as shared:
        console.note(shared.message)
        trial, view = shared.trial, View.of(shared.trial.job)
        name = view.name
    of = trial.trial if trial else None
    if follow and not view.is_over:
        with insistent_interrupts():
            _follow(cluster, name, tail=tail, raw=raw, trial=of)
        return
    pods = [pod for pod in cluster.pods(name) if attempt is None or objects.attempt_of(pod) == attempt]
    if pods and _has_started(pods[0]):
        lines = of_trial(cluster.log(pods[0]["metadata"]["name"], tail=None if of else tail), of)
        _print(deque(lines, maxlen=tail) if of and tail is not None else lines, raw=raw)
        return
    is_published = attempt is None or attempt == len(view.status.attempts)
    stored = view.status.adapter.uri if view.status.adapter else None
    if trial:
        stored = trial.uri if trial.row.phase == "Succeeded" else None
    if not (is_published and stored and _print_stored(stored, tail)):
        raise CliError(_why_nothing(view, pods, attempt), hint=f"finetune status {name}{cluster.options}")


def _has_started(pod: Object) -> bool:
    states = (pod.get("status") or {}).get("containerStatuses") or []
    return any(
        "running" in (state.get("state") or {}) or "terminated" in (state.get("state") or {})
        for state in states
        if state.get("name") == constants.TRAINER_CONTAINER
    )


def of_trial(lines: Iterable[str], trial: str | None) -> Iterable[str]:
    """Return the lines of a process of several trials that tell of `trial`; all where that is None. Pure."""
    return lines if trial is None else (line for line in lines if (log_lines.of_json(line) or {}).get("trial") == trial)


def _print_stored(uri: str, tail: int | None) -> bool:
    """Print the log published with the adapter at `uri`. False when there is none."""
    store = storage.open_store(uri)
    with storage.store_errors():
        from finetune_trainer.stores.errors import StoreNotFound

        lines = storage.read_lines(store, LOG_FILE, MAX_LOG_BYTES)
        try:
            for line in lines if tail is None else deque(lines, maxlen=tail):
                console.out().print(line, soft_wrap=True)
        except StoreNotFound:
            return False
    return True


def _why_nothing(view: View, pods: list[Any], attempt: int | None) -> str:
    if attempt is not None and attempt > len(view.status.attempts):
        return f"{view.name} has no attempt {attempt}: there were {len(view.status.attempts)}"
    if view.is_over or (attempt is not None and attempt < len(view.status.attempts)):
        number = attempt or len(view.status.attempts)
        last = view.status.attempts[number - 1] if view.status.attempts else None
        said = f" Its last word: {last.message}" if last and last.message else ""
        return f"the pod of {view.name} is gone, and its log with it.{said}"
    return f"{view.name} has no log yet ({view.phase})" + (f": {view.why}" if view.why else "")


def _follow(cluster: Cluster, name: str, *, tail: int | None, raw: bool, trial: str | None) -> None:
    """Print the log of one attempt after the other until the job is over."""
    from finetune_cli.output.job_view import View

    finished: set[str] = set()
    shown = Shown()
    told = ""
    for job in cluster.follow(name, None, poll=lambda _: True):
        if job is None:
            raise CliError(f"{name} was deleted while it was followed")
        view = View.of(job)
        try:
            ready = [pod for pod in cluster.pods(name)[:1] if _has_started(pod) and _uid(pod) not in finished]
        except CliError as error:
            if not error.may_pass:
                raise
            continue
        if ready:
            if _follow_pod(cluster, ready[0], shown, tail=tail, raw=raw, trial=trial):
                finished.add(_uid(ready[0]))
        elif view.is_over:
            if view.state == "failed":
                raise CliError(f"{name} failed: {view.why}", hint=view.cure, code=Exit.JOB_FAILED)
            return
        elif not finished and view.why and view.why != told:
            told = view.why
            console.note(f"waiting: {told}")


def _uid(pod: Object) -> str:
    return str(pod["metadata"]["uid"])


@dataclass
class Shown:
    """How many lines of which pod have been printed, to go on there when the connection is cut."""

    pod: str = ""
    lines: int = 0


def _follow_pod(cluster: Cluster, pod: Object, shown: Shown, *, tail: int | None, raw: bool, trial: str | None) -> bool:
    """Print a pod's log as it grows. False when the connection was cut and it is to be taken up again."""
    name = pod["metadata"]["name"]
    if shown.pod != name:
        shown.pod, shown.lines = name, 0
    lines = cluster.log(name, follow=True, tail=tail)
    try:
        for line in itertools.islice(lines, shown.lines, None):
            _print(of_trial([line], trial), raw=raw)
            shown.lines += 1
    except CliError as error:
        # With --tail the lines before are not known, so it cannot be told where to go on.
        if not error.may_pass or tail is not None:
            raise
        return False
    return True


def _print(lines: Iterable[str], *, raw: bool) -> None:
    for line in lines:
        if raw:
            console.out().print(line, soft_wrap=True)
        else:
            text, style = readable(line)
            console.out().print(text, style=style, soft_wrap=True)


def readable(line: str) -> tuple[str, str]:
    """Return a JSON log line as text and its style; any other line as it is. Pure."""
    entry = log_lines.of_json(line)
    if entry is None:
        return line, ""
    return log_lines.readable(entry, details=False), _LEVELS.get(str(entry.get("level", "info")), "")
