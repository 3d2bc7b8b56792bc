"""What a sweep comes to, before anything runs: its trials, the memory each takes, and the GPU-hours of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_cli import forecast
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
class SweepPlan:
    """A sweep, its trials as jobs, and the memory of those that differ in it, by the index of the first such trial."""

    sweep: FineTuneSweep
    trials: tuple[PlannedTrial, ...]
    jobs: list[FineTuneJob]
    layouts: dict[int, Forecast]
    layout_of: list[int]

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
    hours: float | None,
    output: str | None,
) -> None:
    """Print the plan of a sweep. Raises CliError for a wrong one, and where a trial does not fit."""
    from finetune_api import manifest

    try:
        sweep = manifest.check_sweep(document, base, overrides)
    except manifest.ManifestError as error:
        raise refused(error) from None
    made = _plan(sweep, room, model_config)
    if output:
        console.structured(_data(made, hours), output)
    else:
        _page(made, hours)
    fits = [found.fits for found in made.layouts.values()]
    if False in fits:
        raise CliError("", code=Exit.INVALID)
    if room and None in fits:
        raise CliError("", code=Exit.UNREACHABLE)


def _plan(sweep: FineTuneSweep, room: int | None, model_config: Path | None) -> SweepPlan:
    from finetune_api import manifest
    from finetune_api.sweep_trials import expand

    name = sweep.metadata.name
    trials = expand(name, sweep.spec)
    template = sweep.spec.template.model_dump(mode="json", by_alias=True, exclude_unset=True)
    jobs = [manifest.check(manifest.trial_document(name, template, trial)) for trial in trials]
    first: dict[str, int] = {}
    layout_of = [first.setdefault(_weight(job), index) for index, job in enumerate(jobs)]
    chosen = list(first.values())[:MAX_LAYOUTS]
    layouts = {index: forecast.forecast(jobs[index], room, model_config) for index in chosen}
    return SweepPlan(sweep, trials, jobs, layouts, layout_of)


def _weight(job: FineTuneJob) -> str:
    """Return what the memory of a job depends on."""
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude={"output", "checkpoint", "logging", "recovery"})
    spec["training"] = {key: value for key, value in spec["training"].items() if key not in _WITHOUT_WEIGHT}
    spec["lora"] = {key: value for key, value in spec["lora"].items() if key not in ("alpha", "rslora")}
    return json.dumps(spec, sort_keys=True)


def gpu_hours(made: SweepPlan, hours: float | None) -> float | None:
    """Return the GPU-hours of all trials together, if each takes `hours`."""
    return None if hours is None else sum(made.gpus) * hours


def _data(made: SweepPlan, hours: float | None) -> dict[str, Any]:
    spec = made.sweep.spec
    return {
        "sweep": made.sweep.metadata.name,
        "trials": [
            {
                "name": trial.name,
                "job": job.metadata.name,
                "values": trial.values,
                "gpus": gpus,
                "output": job.spec.output.uri,
                "memory": made.layouts[layout].data if layout in made.layouts else None,
            }
            for trial, job, gpus, layout in zip(made.trials, made.jobs, made.gpus, made.layout_of, strict=True)
        ],
        "parallelism": spec.parallelism,
        "gpusAtOnce": sum(sorted(made.gpus, reverse=True)[: spec.parallelism]),
        "gpuHours": gpu_hours(made, hours),
    }


def _page(made: SweepPlan, hours: float | None) -> None:
    from rich.table import Table
    from rich.text import Text

    spec, screen = made.sweep.spec, console.out()
    screen.print(Text(made.sweep.metadata.name, style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("TRIAL", "VALUES", "GPUS", "MEMORY"):
        table.add_column(title, no_wrap=True)
    for trial, gpus, layout in zip(made.trials, made.gpus, made.layout_of, strict=True):
        table.add_row(Text(trial.name), Text(trial.summary), str(gpus), _memory(made.layouts.get(layout)))
    console.page(table, console.PIPED_TABLE_WIDTH)
    at_once = sum(sorted(made.gpus, reverse=True)[: spec.parallelism])
    screen.print(Text(f"\n{len(made.trials)} trials, {spec.parallelism} at a time: {at_once} GPUs at most"))
    total = gpu_hours(made, hours)
    limit = "at most " if spec.early_stopping else ""
    if total is not None:
        screen.print(
            Text(f"{limit}{formatting.number(total)} GPU-hours, if a trial takes {formatting.number(hours or 0)} h")
        )
    else:
        screen.print(Text(f"{limit}{sum(made.gpus)} GPU-hours for each hour that a trial takes; --trial-hours sums up"))
    told = dict.fromkeys(line for found in made.layouts.values() if found.plan is None for line in found.lines)
    for line in told:
        screen.print(Text(line, style="dim"))


def _memory(found: Forecast | None) -> str:
    if found is None or found.plan is None:
        return "does not fit" if found and found.fits is False else ""
    return formatting.size(found.plan.predicted_peak_memory_bytes or 0)
