"""How long runs take, before anything runs: what the trainer's own planning can tell of it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api import constants
from finetune_cli.errors import CliError
from finetune_cli.output import formatting
from finetune_trainer.planning import speed

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob
    from finetune_api.spec_pack import Halving
    from finetune_cli.forecast import Forecast
    from finetune_cli.price import Price

#: Of every job: the image is there, the weights are cached; loading, compiling, publishing and verifying.
START_SECONDS = 90


@dataclass(frozen=True)
class Duration:
    """Steps of a run and its seconds, `start` of which are spent before and after training."""

    steps: int
    step_seconds: float
    start: float = START_SECONDS

    @property
    def seconds(self) -> float:
        """From the start to the published adapter, evaluations left out."""
        return self.start + self.steps * self.step_seconds


@dataclass(frozen=True)
class Cost:
    """What a run takes of time and, with the price of an hour of one GPU, of money."""

    time: Duration
    gpus: int
    price: Price | None

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs together."""
        return self.time.seconds / 3600 * self.gpus

    @property
    def money(self) -> float | None:
        """In the price's currency."""
        return None if self.price is None else self.gpu_hours * self.price.amount

    @property
    def sentence(self) -> str:
        """Time, GPU-hours and money in words."""
        gpu_hours = f"{formatting.number(round(self.gpu_hours, 2))} GPU-hours"
        money = f", {self.price.shown(self.gpu_hours)} at {self.price.amount:,.2f} each" if self.price else ""
        return f"about {formatting.duration(self.time.seconds)}, {gpu_hours}{money}"


def gpu_of(job: FineTuneJob, asked: str | None) -> str | None:
    """Return the GPU that a job runs on, as the speed table names it; None if that cannot be told.

    Args:
        job: Its node selector may say it.
        asked: What --gpu says. Raises CliError if the table does not hold it.
    """
    if asked is not None:
        memory_of(asked)
        return speed.known_gpu(asked)
    label = (job.spec.resources.node_selector or {}).get(constants.LABEL_GPU_PRODUCT)
    return speed.known_gpu(label) if label else None


def memory_of(gpu: str) -> int:
    """Return the bytes of a GPU named with --gpu; raises CliError if the table does not hold it."""
    known = speed.known_gpu(gpu)
    if known is None:
        raise CliError(f"--gpu: {gpu!r} is not in the speed table", hint=f"it has {', '.join(speed.TERAFLOPS)}")
    return int(speed.MEMORY_GIB[known] * (1 << 30))


def predict(job: FineTuneJob, forecast: Forecast, gpu: str | None, rows: int | None = None) -> Duration | str:
    """Return how long `job` takes on `gpu`, or why that cannot be told. `rows` are its training rows, if given."""
    if gpu is None:
        return "name the GPU with --gpu, such as H100"
    if forecast.plan is None or forecast.shape is None:
        return "the model's shape is not known"
    steps = steps_of(job, rows)
    if steps is None:
        return "give --rows or training.maxSteps: rows are counted in one local file of JSON lines alone"
    return Duration(steps, speed.step_seconds(forecast.plan, forecast.shape, job.spec, gpu))


def steps_of(job: FineTuneJob, rows: int | None = None) -> int | None:
    """Return the optimizer steps of a job; None where its rows would have to be read first, and are not given."""
    training, data = job.spec.training, job.spec.dataset
    if training.max_steps:
        return int(training.max_steps)
    rows = rows or _rows_of(job)
    if rows is None:
        return None
    trained = rows - round(rows * (data.eval_fraction or 0))
    return max(1, math.ceil(max(1, -(-trained // training.batch_size)) * training.epochs))


def _rows_of(job: FineTuneJob) -> int | None:
    """Return the rows of a local file of JSON lines; None of anything else."""
    data = job.spec.dataset
    if data.train is None or not data.train.startswith("file://") or data.sources:
        return None
    file = Path(data.train.removeprefix("file://"))
    if file.suffix != ".jsonl":
        return None
    try:
        with file.open("rb") as lines:
            return sum(1 for line in lines if line.strip())
    except OSError:
        return None


def one_after_the_other(seconds: Sequence[float], at_a_time: int) -> float:
    """Return the seconds until all trials have ended, so many at a time, each in its turn."""
    ends = [0.0] * min(at_a_time, len(seconds))
    for each in seconds:
        heapq.heapreplace(ends, ends[0] + each)
    return max(ends, default=0.0)


def with_halving(durations: Sequence[Duration], halving: Halving) -> float:
    """Return the seconds of all trials together where at each rung one in reductionFactor goes on."""
    total = 0.0
    for each in durations:
        share, before = 1.0, 0
        for rung in halving.rungs:
            step = min(rung, each.steps)
            total += share * (step - before) * each.step_seconds
            share, before = share / halving.reduction_factor, step
        total += each.start + share * (each.steps - before) * each.step_seconds
    return total
