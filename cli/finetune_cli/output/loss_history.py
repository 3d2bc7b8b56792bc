"""The loss over time, from where it is written down: the running pod's log, or the published metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from finetune_api import constants
from finetune_cli import storage
from finetune_cli.errors import CliError
from finetune_cli.output import console

if TYPE_CHECKING:
    from finetune_cli.kube.client import Cluster
    from finetune_cli.output.job_view import View

_STEP = re.compile(r"^Step ([0-9]+)$")
TAIL_LINES = 3000
#: Seconds to wait for a store: the sparkline is an ornament, never worth a pause.
STORE_TIMEOUT = 2
#: More than the metrics of any run have.
MAX_METRICS_BYTES = 8 << 20


def loss_history(cluster: Cluster, view: View) -> list[float]:
    """Training losses, oldest first; empty when they cannot be had at once."""
    try:
        if view.status.adapter:
            return losses(published(view.status.adapter.uri))
        if view.status.progress and view.status.progress.step:
            pods = cluster.pods(view.name)
            return losses(cluster.log(pods[0]["metadata"]["name"], tail=TAIL_LINES)) if pods else []
    except storage.TooLargeError as error:
        console.note(f"no loss curve: {error.message}")
    except CliError:
        pass
    return []


def published(address: str) -> Iterator[str]:
    """Lines of training/metrics.jsonl below an adapter's URI. Raises CliError."""
    store = storage.open_store(address, timeout=STORE_TIMEOUT)
    with storage.store_errors():
        yield from storage.read_lines(store, constants.METRICS_FILE, MAX_METRICS_BYTES)


def losses(lines: Iterable[str]) -> list[float]:
    """Return the training losses in JSON lines, oldest first. Pure."""
    found = curve(lines, "loss")
    return [found[step] for step in sorted(found)]


def curve(lines: Iterable[str], key: str) -> dict[int, float]:
    """Return a value in JSON lines (metrics.jsonl or a pod's log) by step; a step done twice counts once. Pure."""
    found: dict[int, float] = {}
    for line in lines:
        entry = _parsed(line)
        step = entry.get("step")
        if step is None and (match := _STEP.match(str(entry.get("event", "")))):
            step = int(match[1])
        if isinstance(step, int) and (value := _number(entry.get(key))) is not None:
            found[step] = value
    return found


def _parsed(line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line) if line.startswith("{") else None
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None
