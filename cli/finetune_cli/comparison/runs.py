"""What is compared of one run, and what differs among several. Pure. All of it may have been written by others."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from finetune_api.plain_text import one_line
from finetune_cli.output.job_view import gpus_of

if TYPE_CHECKING:
    from finetune_api.status import Usage
    from finetune_cli.output.job_view import View
    from finetune_cli.published import Published

#: Metrics in the order of their columns; the losses should fall, the others should rise.
METRICS = {
    "evalLoss": "Held-out loss",
    "trainLoss": "Training loss",
    "accuracy": "Right labels",
    "f1": "F1",
    "validJson": "Valid JSON",
}
FALLING = ("evalLoss", "trainLoss")
#: What differs in every run and says nothing about it.
_NOT_COMPARED = ("output.", "checkpoint.uri", "suspend")
#: Of one run's spec: values, and characters of each.
MAX_VALUES = 400
MAX_LENGTH = 200


@dataclass(frozen=True)
class Curves:
    """Losses by optimizer step: of training, and of held-out rows."""

    train: dict[int, float] = field(default_factory=dict)
    held_out: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AnsweredRow:
    """A held-out row and a run's answer to it."""

    row: int
    prompt: str
    expected: str
    answer: str
    right: bool


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        name: What it is called here.
        uri: Where its adapter lies, or should; empty if that is not known.
        phase: Where it stands.
        values: Its spec by dotted path.
        metrics: Its final metrics; those of the base model end in Before.
        gpu_hours: GPUs multiplied by the hours that the run held them; None if that is not known.
        usage: What its job's ended attempts used, with their price if there is one; None for what is no job.
        curves: Its losses.
        answers: Its answers to held-out rows.
    """

    name: str
    uri: str
    phase: str
    values: Mapping[str, str]
    metrics: Mapping[str, float]
    gpu_hours: float | None
    curves: Curves = field(default_factory=Curves)
    answers: tuple[AnsweredRow, ...] = ()
    usage: Usage | None = None

    @property
    def seconds(self) -> float | None:
        """How long it trained, without starting and publishing."""
        return self.metrics.get("trainSeconds")


def of_job(view: View) -> Run:
    """Return the run of a FineTuneJob as the cluster has it."""
    status = view.status
    uri = status.adapter.uri if status.adapter else str((view.spec.get("output") or {}).get("uri", ""))
    return Run(
        name=view.name,
        uri=uri,
        phase=view.phase,
        values=values_of(view.spec),
        metrics=finite(status.metrics or {}),
        gpu_hours=view.gpu_hours(),
        usage=status.usage,
    )


def of_published(published: Published, job: Any, name: str) -> Run:
    """Return the run whose adapter was published; `job` is its manifest as plain data."""
    spec = job.get("spec") if isinstance(job, dict) else None
    spec = spec if isinstance(spec, dict) else {}
    metrics, gpus = finite(published.manifest.metrics or {}), gpus_of(spec)
    seconds = metrics.get("trainSeconds")
    return Run(
        name=name,
        uri=published.address,
        phase="Succeeded",
        values=values_of(spec),
        metrics=metrics,
        gpu_hours=gpus * seconds / 3600 if seconds is not None and gpus is not None else None,
    )


def finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics that are numbers one can compare and draw."""
    return {one_line(key): value for key, value in metrics.items() if math.isfinite(value) and abs(value) < 1e15}


def values_of(spec: Mapping[str, Any]) -> dict[str, str]:
    """Return a spec's values by dotted path, with the defaults that it leaves out, as one line of text each."""
    from pydantic import ValidationError

    from finetune_api.spec import FineTuneJobSpec

    try:
        checked = FineTuneJobSpec.model_validate(spec, by_alias=True, by_name=False)
        spec = checked.model_dump(mode="json", by_alias=True, exclude_none=True)
    except (ValidationError, RecursionError):
        pass  # of another version, or by another hand: it is shown as it is
    found: dict[str, str] = {}
    for path, value in _leaves(spec, ""):
        if len(found) == MAX_VALUES:
            break
        if not path.startswith(_NOT_COMPARED):
            found[path[:MAX_LENGTH]] = value[:MAX_LENGTH]
    return found


def _leaves(node: Any, path: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict) and depth < 8:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{one_line(str(key))}" if path else one_line(str(key)), depth + 1)
    elif node is not None:
        yield path, _text(node)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return one_line(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return one_line(", ".join(value))
    try:
        return one_line(json.dumps(value, default=str))
    except (ValueError, RecursionError):
        return "…"


def differing(runs: Sequence[Run]) -> list[str]:
    """Return the paths whose values are not the same in all runs, in the order of the first run that has each."""
    paths = dict.fromkeys(path for run in runs for path in run.values)
    return [path for path in paths if len({run.values.get(path) for run in runs}) > 1]


def shared(runs: Sequence[Run]) -> dict[str, str]:
    """Return the values that all runs have in common."""
    paths = set(differing(runs))
    return {path: value for path, value in runs[0].values.items() if path not in paths} if runs else {}


def measured(runs: Sequence[Run]) -> list[str]:
    """Return the metrics that any run has, in the order of METRICS."""
    return [metric for metric in METRICS if any(metric in run.metrics for run in runs)]


def best_of(runs: Sequence[Run], metric: str) -> float | None:
    """Return the best value of a metric; None where there is nothing to choose from."""
    found = [run.metrics[metric] for run in runs if metric in run.metrics]
    if len(found) < 2:
        return None
    return min(found) if metric in FALLING else max(found)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Return the last part of each path, or all of it where that does not tell two apart."""
    ends = [path.rpartition(".")[2] for path in paths]
    return {path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends, strict=True)}


def confusion(run: Run) -> tuple[list[str], list[str], dict[tuple[str, str], int]] | None:
    """Return right labels, labels read, and the counts of their pairs; None where the metrics hold no matrix."""
    counts: dict[tuple[str, str], int] = {}
    for key, value in run.metrics.items():
        kind, _, pair = key.partition(".")
        right, dot, read = pair.rpartition(".")
        if kind == "confusion" and dot and not read.endswith("Before"):
            counts[right, read] = round(value)
    rights = list(dict.fromkeys(right for right, _ in counts))
    reads = list(dict.fromkeys(read for _, read in counts))
    return (rights, reads, counts) if counts and len(rights) <= 8 and len(reads) <= 9 else None


def same_rows(one: Run, other: Run) -> list[tuple[AnsweredRow, AnsweredRow]]:
    """Return the rows that both answered, those first that one had right and the other wrong."""
    theirs = {(each.row, each.prompt): each for each in other.answers}
    pairs = [(each, found) for each in one.answers if (found := theirs.get((each.row, each.prompt)))]
    return sorted(pairs, key=lambda pair: (pair[0].right == pair[1].right, pair[0].right, pair[0].row))
