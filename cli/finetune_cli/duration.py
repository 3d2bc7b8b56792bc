"""How long runs take, before anything runs: what the trainer's own planning can tell of it."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_cli.errors import CliError
from finetune_trainer.planning import speed

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob
    from finetune_api.sweep import Halving
    from finetune_cli.forecast import Forecast

#: Of every job: the image is there, the weights are cached; loading, compiling, publishing and verifying.
START_SECONDS = 90
#: Node label of NVIDIA's GPU feature discovery.
_LABEL = "nvidia.com/gpu.product"


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


def gpu_of(job: FineTuneJob, asked: str | None) -> str | None:
    """Return the GPU that a job runs on, as the speed table names it; None if that cannot be told.

    Args:
        job: Its node selector may say it.
        asked: What --gpu says. Raises CliError if the table does not hold it.
    """
    if asked is not None:
        known = speed.known_gpu(asked)
        if known is None:
            raise CliError(f"--gpu: {asked!r} is not in the speed table", hint=f"it has {', '.join(speed.TERAFLOPS)}")
        return known
    label = (job.spec.resources.node_selector or {}).get(_LABEL)
    return speed.known_gpu(label) if label else None


def predict(job: FineTuneJob, forecast: Forecast, gpu: str | None) -> Duration | str:
    """Return how long `job` takes on `gpu`, or why that cannot be told."""
    if gpu is None:
        return "name the GPU with --gpu, such as H100"
    if forecast.plan is None or forecast.shape is None:
        return "the model's shape is not known"
    steps = steps_of(job)
    if steps is None:
        return "set training.maxSteps: rows are counted in one local file of JSON lines alone"
    return Duration(steps, speed.step_seconds(forecast.plan, forecast.shape, job.spec, gpu))


def steps_of(job: FineTuneJob) -> int | None:
    """Return the optimizer steps of a job; None where its rows would have to be read first."""
    training, data = job.spec.training, job.spec.dataset
    if training.max_steps:
        return int(training.max_steps)
    if data.train is None or not data.train.startswith("file://") or data.eval_fraction or data.sources:
        return None
    file = Path(data.train.removeprefix("file://"))
    if file.suffix != ".jsonl":
        return None
    try:
        with file.open("rb") as lines:
            rows = sum(1 for line in lines if line.strip())
    except OSError:
        return None
    return max(1, -(-rows // training.batch_size)) * int(training.epochs)


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
