"""What a sweep comes to, before anything runs: its trials, the memory each takes, and the GPU-hours of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api import sweep_packs
from finetune_api.sweep_trials import job_name
from finetune_cli import duration, forecast, pack_forecast
from finetune_cli.duration import Duration
from finetune_cli.errors import CliError, Exit
from finetune_cli.forecast import Forecast
from finetune_cli.manifests import refused
from finetune_cli.output import console, formatting
from finetune_cli.pack_forecast import HolderPlan

if TYPE_CHECKING:
    from finetune_api.manifest import Document
    from finetune_api.spec import FineTuneJob
    from finetune_api.sweep import FineTuneSweep
    from finetune_api.sweep_trials import PlannedTrial
    from finetune_cli.price import Price, PriceOf

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
    price: PriceOf | None = None

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
    """How long each trial takes alone, or why that cannot be told."""
    held: list[HolderPlan]
    """The FineTuneJobs that its trials are put into."""
    price: Price | None
    """Of one hour of one GPU."""

    @property
    def packs(self) -> list[HolderPlan]:
        """Those of several trials."""
        return [each for each in self.held if each.holder.is_pack]

    @property
    def pack_of(self) -> dict[str, str]:
        """The name of the pack that each packed trial is in."""
        return {trial: each.holder.name for each in self.packs for trial in each.holder.trials}

    @property
    def gpus(self) -> list[int]:
        """The GPUs of each trial."""
        return [gpus_of(job) for job in self.jobs]


def gpus_of(job: FineTuneJob) -> int:
    """Return the GPUs of a job, over all nodes."""
    return int(job.spec.resources.nodes * job.spec.resources.gpus_per_node)


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
    fits = [each.memory.fits for each in made.held if each.memory]
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
    specs = [(trial, job.spec) for trial, job in zip(trials, jobs, strict=True)]
    index, held = {trial.name: number for number, trial in enumerate(trials)}, []
    for holder in sweep_packs.holders(name, sweep.spec, specs, sweep.spec.parallelism):
        mine = [index[trial] for trial in holder.trials]
        memory, takes, places = layouts.get(layout_of[mine[0]]), times[mine[0]], 1
        if holder.is_pack:
            together = [jobs[each] for each in mine]
            single = memory
            halves = sweep.spec.early_stopping is not None
            memory, places = pack_forecast.memory_of(together, holder.at_once, halves, room, model_config)
            gpu = None if time.hours is not None else duration.gpu_of(together[0], time.gpu)
            takes = pack_forecast.time_of(together, [times[each] for each in mine], single, memory, places, gpu)
        held.append(HolderPlan(holder, gpus_of(jobs[mine[0]]), memory, takes, places))
    return SweepPlan(sweep, trials, jobs, layouts, layout_of, times, held, time.price and time.price(jobs[0]))


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
    for each in (*made.times, *(held.time for held in made.held)):
        if isinstance(each, str):
            return each
    known, spec = [each for each in made.times if isinstance(each, Duration)], made.sweep.spec
    gpu_seconds = sum((each.seconds or 0.0) * each.gpus for each in made.held)
    about = None
    if spec.early_stopping and any(each.steps for each in known):
        share = duration.with_halving(known, spec.early_stopping) / sum(each.seconds for each in known)
        about = share * gpu_seconds / 3600
    seconds, _ = pack_forecast.whole(made.held, spec.parallelism)
    return Hours((seconds or 0.0) / 3600, gpu_seconds / 3600, about)


def _data(made: SweepPlan) -> dict[str, Any]:
    spec, total = made.sweep.spec, hours_of(made)
    sweep, packs = made.sweep.metadata.name, made.pack_of
    return {
        "sweep": sweep,
        "trials": [
            {
                "name": trial.name,
                "job": job_name(sweep, packs.get(trial.name, trial.name)),
                "values": None if spec.strategy == "tpe" else trial.values,
                "gpus": gpus,
                "output": job.spec.output.uri,
                "memory": made.layouts[layout].data if layout in made.layouts and trial.name not in packs else None,
                "hours": time.seconds / 3600 if isinstance(time, Duration) and trial.name not in packs else None,
            }
            for trial, job, gpus, layout, time in zip(
                made.trials, made.jobs, made.gpus, made.layout_of, made.times, strict=True
            )
        ],
        "packs": [
            {
                "job": job_name(sweep, each.holder.name),
                "trials": list(each.holder.trials),
                "atOnce": each.places,
                "memory": each.memory and each.memory.data,
                "hours": each.seconds / 3600 if each.seconds is not None else None,
            }
            for each in made.packs
        ],
        "parallelism": spec.parallelism,
        "gpusAtOnce": pack_forecast.whole(made.held, spec.parallelism)[1],
        "hours": total.hours if isinstance(total, Hours) else None,
        "gpuHours": total.gpu_hours if isinstance(total, Hours) else None,
        "gpuHoursWithEarlyStopping": total.about if isinstance(total, Hours) else None,
        "cost": _cost(total.gpu_hours, made.price) if isinstance(total, Hours) else None,
        "costWithEarlyStopping": _cost(total.about, made.price) if isinstance(total, Hours) else None,
        "currency": made.price and (made.price.currency or None),
    }


def _cost(gpu_hours: float | None, price: Price | None) -> float | None:
    return None if gpu_hours is None or price is None else gpu_hours * price.amount


def _page(made: SweepPlan) -> None:
    from rich.table import Table
    from rich.text import Text

    spec, screen, packs = made.sweep.spec, console.out(), made.pack_of
    screen.print(Text(made.sweep.metadata.name, style="bold"))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for title in ("TRIAL", "VALUES", *(["PACK"] if packs else []), "GPUS", "MEMORY", "TIME"):
        table.add_column(title, no_wrap=True)
    for trial, gpus, layout, time in zip(made.trials, made.gpus, made.layout_of, made.times, strict=True):
        takes = formatting.duration(time.seconds) if isinstance(time, Duration) else ""
        values = "drawn when it starts" if spec.strategy == "tpe" else trial.summary
        alone = [str(gpus), _memory(made.layouts.get(layout)), takes]
        pack = packs.get(trial.name)
        table.add_row(Text(trial.name), Text(values), *([pack or ""] if packs else []), *([] if pack else alone))
    console.page(table, console.PIPED_TABLE_WIDTH)
    if packs:
        screen.print()
    for each in made.packs:
        takes = f", {formatting.duration(each.seconds)}" if each.seconds is not None else ""
        memory = f", {shown}" if (shown := _memory(each.memory)) else ""
        what = f"{len(each.holder.trials)} trials on one GPU, {each.places} in each step{memory}{takes}"
        screen.print(Text(f"{each.holder.name}: {what}"))
    _, at_once = pack_forecast.whole(made.held, spec.parallelism)
    screen.print(Text(f"\n{len(made.trials)} trials, {spec.parallelism} at a time: {_gpus(at_once)} at most"))
    total, most = hours_of(made), "at most " if spec.early_stopping else ""
    if isinstance(total, Hours):
        about = f", about {formatting.number(total.about)} with early stopping" if total.about is not None else ""
        time = formatting.duration(total.hours * 3600)
        screen.print(Text(f"{most}{time} and {formatting.number(total.gpu_hours)} GPU-hours{about}"))
        if made.price:
            less = f", about {made.price.shown(total.about)} with early stopping" if total.about is not None else ""
            hour = f"{made.price.amount:,.2f} for a GPU-hour"
            screen.print(Text(f"{most}{made.price.shown(total.gpu_hours)} at {hour}{less}"))
    else:
        all_gpus = sum(held.gpus for held in made.held)
        rate = f"{most}{all_gpus} GPU-hours for each hour that a {'job' if packs else 'trial'} takes"
        screen.print(Text(f"{rate}; to predict it: {total}, or --trial-hours"), soft_wrap=True)
    memories = [held.memory for held in made.held if held.memory]
    told = dict.fromkeys(line for found in memories if found.plan is None for line in found.lines)
    for line in told:
        screen.print(Text(line, style="dim"))


def _gpus(number: int) -> str:
    return f"{number} GPU{'' if number == 1 else 's'}"


def _memory(found: Forecast | None) -> str:
    if found is None or found.plan is None:
        return "does not fit" if found and found.fits is False else ""
    return formatting.size(found.plan.predicted_peak_memory_bytes or 0)
