"""What a sweep comes to, before anything runs: its trials, the memory each takes, and the GPU-hours of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli import duration, forecast
from finetune_cli.duration import Duration
from finetune_cli.errors import CliError, Exit
from finetune_cli.forecast import Forecast
from finetune_cli.manifests import refused
from finetune_cli.output import console, formatting

if TYPE_CHECKING:
    from finetune_api.manifest import Document
    from finetune_api.spec import FineTuneJob
    from finetune_api.sweep import FineTuneSweep
    from finetune_api.sweep_trials import PlannedTrial

#: Fields that change nothing about memory: trials that differ only in them are predicted once.
_WITHOUT_WEIGHT = (
    "learningRate",
    "scheduler",
    "warmupRatio",
    "weightDecay",
    "seed",
    "epochs",
    "maxSteps",
    "maxGradNorm",
)
#: Layouts predicted at most: each takes a tenth of a second, and a thousand are not read.
MAX_LAYOUTS = 16


@dataclass(frozen=True)
class Time:
    """What the user says of the time of trials: their GPU and rows, or their hours; and the price of a GPU-hour."""

    gpu: str | None = None
    hours: float | None = None
    rows: int | None = None
    price: float | None = None

    def of(self, job: FineTuneJob, memory: Forecast | None) -> Duration | str:
        """Return how long a trial takes, or why that cannot be told."""
        if self.hours is not None:
            return Duration(0, 0.0, self.hours * 3600)
        gpu = duration.gpu_of(job, self.gpu)
        return (
            duration.predict(job, memory, gpu, self.rows)
            if memory
            else f"only the first {MAX_LAYOUTS} layouts are predicted"
        )


@dataclass(frozen=True)
class SweepPlan:
    """A sweep, its trials as jobs, and the memory of those that differ in it, by the index of the first such trial."""

    sweep: FineTuneSweep
    trials: tuple[PlannedTrial, ...]
    jobs: list[FineTuneJob]
    layouts: dict[int, Forecast]
    layout_of: list[int]
    times: list[Duration | str]
    """How long each trial takes, or why that cannot be told."""
    price: float | None
    """Of one hour of one GPU."""

    @property
    def gpus(self) -> list[int]:
        """The GPUs of each trial."""
        return [job.spec.resources.nodes * job.spec.resources.gpus_per_node for job in self.jobs]


def plan_sweep(
    document: Document,
    base: Path,
    overrides: Sequence[str],
    room: int | None,
    model_config: Path | None,
    time: Time,
    output: str | None,
) -> None:
    """Print the plan of a sweep. Raises CliError for a wrong one, and where a trial does not fit."""
    from finetune_api import manifest

    try:
        sweep = manifest.check_sweep(document, base, overrides)
    except manifest.ManifestError as error:
        raise refused(error) from None
    made = _plan(sweep, room, model_config, time)
    if output:
        console.structured(_data(made), output)
    else:
        _page(made)
    fits = [found.fits for found in made.layouts.values()]
    if False in fits:
        raise CliError("", code=Exit.INVALID)
    if room and None in fits:
        raise CliError("", code=Exit.UNREACHABLE)


def _plan(sweep: FineTuneSweep, room: int | None, model_config: Path | None, time: Time) -> SweepPlan:
    from finetune_api import manifest
    from finetune_api.sweep_trials import expand, greatest

    name = sweep.metadata.name
    trials = expand(name, sweep.spec)
    if sweep.spec.strategy == "tpe":  # as if each were the largest
        trials = tuple(replace(trial, values=greatest(sweep.spec)) for trial in trials)
    template = sweep.spec.template.model_dump(mode="json", by_alias=True, exclude_unset=True)
    jobs = [manifest.check(manifest.trial_document(name, template, trial)) for trial in trials]
    first: dict[str, int] = {}
    layout_of = [first.setdefault(_weight(job), index) for index, job in enumerate(jobs)]
    chosen = list(first.values())[:MAX_LAYOUTS]
    layouts = {index: forecast.forecast(jobs[index], room, model_config) for index in chosen}
    times = [time.of(job, layouts.get(layout)) for job, layout in zip(jobs, layout_of, strict=True)]
    return SweepPlan(sweep, trials, jobs, layouts, layout_of, times, time.price)


def _weight(job: FineTuneJob) -> str:
    """Return what the memory of a job depends on."""
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude={"output", "checkpoint", "logging", "recovery"})
    spec["training"] = {key: value for key, value in spec["training"].items() if key not in _WITHOUT_WEIGHT}
    spec["lora"] = {key: value for key, value in spec["lora"].items() if key not in ("alpha", "rslora")}
    return json.dumps(spec, sort_keys=True)


@dataclass(frozen=True)
class Hours:
    """Of the whole sweep: hours until it ends, and GPU-hours; with early stopping both at most, and GPU-hours about."""

    hours: float
    gpu_hours: float
    about: float | None


def hours_of(made: SweepPlan) -> Hours | str:
    """Return what all trials take together, or why that cannot be told."""
    known = [each for each in made.times if isinstance(each, Duration)]
    if len(known) < len(made.times):
        return next(each for each in made.times if isinstance(each, str))
    seconds, spec = [each.seconds for each in known], made.sweep.spec
    gpu_seconds = sum(each * gpus for each, gpus in zip(seconds, made.gpus, strict=True))
    about = None
    if spec.early_stopping and any(each.steps for each in known):
        about = duration.with_halving(known, spec.early_stopping) / sum(seconds) * gpu_seconds / 3600
    whole = duration.one_after_the_other(seconds, spec.parallelism)
    return Hours(whole / 3600, gpu_seconds / 3600, about)


def _data(made: SweepPlan) -> dict[str, Any]:
    spec, total = made.sweep.spec, hours_of(made)
    return {
        "sweep": made.sweep.metadata.name,
        "trials": [
            {
                "name": trial.name,
                "job": job.metadata.name,
                "values": None if spec.strategy == "tpe" else trial.values,
                "gpus": gpus,
                "output": job.spec.output.uri,
                "memory": made.layouts[layout].data if layout in made.layouts else None,
                "hours": time.seconds / 3600 if isinstance(time, Duration) else None,
            }
            for trial, job, gpus, layout, time in zip(
                made.trials, made.jobs, made.gpus, made.layout_of, made.times, strict=True
            )
        ],
        "parallelism": spec.parallelism,
        "gpusAtOnce": sum(sorted(made.gpus, reverse=True)[: spec.parallelism]),
        "hours": total.hours if isinstance(total, Hours) else None,
        "gpuHours": total.gpu_hours if isinstance(total, Hours) else None,
        "gpuHoursWithEarlyStopping": total.about if isinstance(total, Hours) else None,
        "cost": _cost(total.gpu_hours, made.price) if isinstance(total, Hours) else None,
        "costWithEarlyStopping": _cost(total.about, made.price) if isinstance(total, Hours) else None,
    }


def _cost(gpu_hours: float | None, price: float | None) -> float | None:
    return None if gpu_hours is None or price is None else gpu_hours * price


def _page(made: SweepPlan) -> None:
    from rich.table import Table
    from rich.text import Text

    spec, screen = made.sweep.spec, console.out()
    screen.print(Text(made.sweep.metadata.name, style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("TRIAL", "VALUES", "GPUS", "MEMORY", "TIME"):
        table.add_column(title, no_wrap=True)
    for trial, gpus, layout, time in zip(made.trials, made.gpus, made.layout_of, made.times, strict=True):
        takes = formatting.duration(time.seconds) if isinstance(time, Duration) else ""
        values = "drawn when it starts" if spec.strategy == "tpe" else trial.summary
        table.add_row(Text(trial.name), Text(values), str(gpus), _memory(made.layouts.get(layout)), takes)
    console.page(table, console.PIPED_TABLE_WIDTH)
    at_once = sum(sorted(made.gpus, reverse=True)[: spec.parallelism])
    screen.print(Text(f"\n{len(made.trials)} trials, {spec.parallelism} at a time: {at_once} GPUs at most"))
    total, most = hours_of(made), "at most " if spec.early_stopping else ""
    if isinstance(total, Hours):
        about = f", about {formatting.number(total.about)} with early stopping" if total.about is not None else ""
        time = formatting.duration(total.hours * 3600)
        screen.print(Text(f"{most}{time} and {formatting.number(total.gpu_hours)} GPU-hours{about}"))
        if (cost := _cost(total.gpu_hours, made.price)) is not None:
            less = _cost(total.about, made.price)
            about = f", about {less:,.2f} with early stopping" if less is not None else ""
            screen.print(Text(f"{most}{cost:,.2f} at {made.price:,.2f} for a GPU-hour{about}"))
    else:
        each = f"{most}{sum(made.gpus)} GPU-hours for each hour that a trial takes"
        screen.print(Text(f"{each}; to predict it: {total}, or --trial-hours"), soft_wrap=True)
    told = dict.fromkeys(line for found in made.layouts.values() if found.plan is None for line in found.lines)
    for line in told:
        screen.print(Text(line, style="dim"))


def _memory(found: Forecast | None) -> str:
    if found is None or found.plan is None:
        return "does not fit" if found and found.fits is False else ""
    return formatting.size(found.plan.predicted_peak_memory_bytes or 0)
