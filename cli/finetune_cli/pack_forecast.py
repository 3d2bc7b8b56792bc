"""What trials take that share a GPU: the memory of their pass, and the time until the last of them has ended."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.sweep_packs import Holder
from finetune_cli import duration, forecast
from finetune_cli.duration import Duration
from finetune_cli.forecast import Forecast
from finetune_trainer.planning import passes, speed
from finetune_trainer.planning.memory import adapter_weights

if TYPE_CHECKING:
    from finetune_api.spec import FineTuneJob
    from finetune_api.status import ExecutionPlan


@dataclass(frozen=True)
class HolderPlan:
    """One FineTuneJob of a sweep, its memory (None where that is not predicted), and how long it takes, or why not."""

    holder: Holder
    gpus: int
    memory: Forecast | None
    time: Duration | str
    places: int
    """Trials in each step: of a pack that does not fit, fewer than it counts as when others wait for their turn."""

    @property
    def seconds(self) -> float | None:
        return self.time.seconds if isinstance(self.time, Duration) else None


def memory_of(
    jobs: Sequence[FineTuneJob], at_once: int, halves: bool, room: int | None, config: Path | None
) -> tuple[Forecast, int]:
    """Return the memory of a pack, and how many of its trials fit into a pass: as the trainer finds it out.

    Args:
        jobs: Its trials as jobs.
        at_once: How many of them train at the same time at most.
        halves: Whether they wait for each other at rungs, where they keep their adapters.
        room: Bytes of the GPU.
        config: The model's config.json, if it is given.
    """
    asked: dict[tuple[int, int, bool], Forecast] = {}

    def ask(places: int, held: int = 0, captured: bool = False) -> Forecast:
        key = places, held, captured
        if key not in asked:
            asked[key] = forecast.forecast(_as_one(jobs, *key), room, config)
        return asked[key]

    def plan_for(places: int, held: int, captured: bool) -> ExecutionPlan | None:
        found = ask(places, held, captured)
        return found.plan if found.fits or not captured else None

    first = ask(at_once)
    if first.plan is None and first.fits is not False:
        return first, at_once

    def weights_in(places: int) -> int | None:
        shape = ask(places).shape
        return adapter_weights(shape, _as_one(jobs, places).spec) if shape else None

    fits = passes.fit([job.spec for job in jobs], at_once, halves, plan_for, weights_in)
    return replace(ask(fits.places, len(jobs) if fits.holds_all else 0), plan=fits.plan), fits.places


def _as_one(jobs: Sequence[FineTuneJob], places: int, held: int = 0, captured: bool = False) -> FineTuneJob:
    """Return a job whose steps are passes of `places` trials: all of their rows, and the ranks of the largest.

    If `held` trials are in memory, the ranks are those of so many.
    """
    ranks = sorted((job.spec.lora.rank for job in jobs), reverse=True)[: max(places, held)]
    spec = passes.spec_of_pass(passes.spec_of_largest([job.spec for job in jobs]), places, captured)
    lora = spec.lora.model_copy(update={"rank": sum(ranks)})
    return jobs[0].model_copy(update={"spec": spec.model_copy(update={"lora": lora})})


def time_of(
    jobs: Sequence[FineTuneJob],
    alone: Sequence[Duration | str],
    single: Forecast | None,
    memory: Forecast,
    places: int,
    gpu: str | None,
) -> Duration | str:
    """Return how long a pack takes, or why that cannot be told.

    Args:
        jobs: Its trials as jobs.
        alone: How long each takes alone, or why that cannot be told.
        single: The memory and layout of the first of them alone, if that is known.
        memory: That of the pack.
        places: Trials that train at the same time.
        gpu: The GPU that all run on.
    """
    known = [each for each in alone if isinstance(each, Duration)]
    if len(known) < len(alone):
        return next(each for each in alone if isinstance(each, str))
    if not any(each.steps for each in known):  # hours that the user gave
        slower = _slower(jobs, single, memory, places)
        return Duration(0, 0.0, duration.one_after_the_other([each.seconds for each in known], places) * slower)
    found = duration.predict(_as_one(jobs, places), memory, gpu, rows=1)
    if isinstance(found, str):
        return found
    steps = duration.one_after_the_other([float(each.steps) for each in known], places)
    return replace(found, steps=round(steps))


def _slower(jobs: Sequence[FineTuneJob], single: Forecast | None, memory: Forecast, places: int) -> float:
    """Return how much longer a step of all places takes than one of a trial alone; no less where that is not known."""
    if single is None or single.plan is None or single.shape is None or memory.plan is None:
        return float(places)
    gpu = speed.MEASURED[0]
    alone = speed.step_seconds(single.plan, single.shape, jobs[0].spec, gpu)
    return speed.step_seconds(memory.plan, single.shape, _as_one(jobs, places).spec, gpu) / alone


def whole(plans: Sequence[HolderPlan], parallelism: int) -> tuple[float | None, int]:
    """Return the seconds until all jobs have ended, where each has its time, and the most GPUs at the same time.

    They start in their order; so many trials run at the same time, or one job.
    """
    now, running, gpus, most = 0.0, list[tuple[float, int, int]](), 0, 0
    at_once = 0
    for each in plans:
        while running and at_once + each.holder.at_once > parallelism:
            now, trials, freed = heapq.heappop(running)
            at_once, gpus = at_once - trials, gpus - freed
        heapq.heappush(running, (now + (each.seconds or 0.0), each.holder.at_once, each.gpus))
        at_once, gpus = at_once + each.holder.at_once, gpus + each.gpus
        most = max(most, gpus)
    end = max((end for end, _, _ in running), default=0.0)
    return (None if any(each.seconds is None for each in plans) else max(now, end)), most
