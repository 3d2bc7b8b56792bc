"""How many trials of a process train at the same time, and how their passes are laid out."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import WontFit
from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning.passes import (
    BYTES_IN_PLACE,
    fewer_places,
    replayed,
    spec_of_largest,
    spec_of_pass,
    weights_of_largest,
)

log = structlog.get_logger(__name__)
#: Makes the plan of a job with this spec and base model. Also takes `attention` and `tried`, as engine.plan does.
Make = Callable[..., ExecutionPlan]


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        places: Trials that train at the same time.
        plan: Of their passes.
        holds_all: Whether there is memory for the adapters of all trials, so that those that wait keep theirs.
    """

    places: int
    plan: ExecutionPlan
    holds_all: bool


def fit(
    specs: Sequence[FineTuneJobSpec], at_once: int, halves: bool, make: Make, spec: FineTuneJobSpec, base: BaseModel
) -> Fit:
    """Return how many places fit, where a trial's whole step fits into its own if it can.

    Args:
        specs: Those of all trials.
        at_once: How many train at the same time at most.
        halves: Whether trials wait for each other at rungs.
        make: Makes a plan.
        spec: That of the trial that asks.
        base: Its base model.

    Raises:
        WontFit: Not even one fits.
    """
    trained = partial(_trained, base, spec, specs)
    of_trials = partial(_with_trials, base, trained)
    spec = spec_of_largest(specs)
    places, plan = _places(at_once, make, spec, of_trials)
    make, holds_all = partial(make, attention=plan.attention, tried=True), False
    if halves:
        with suppress(WontFit):
            as_many, holding = _places(at_once, make, spec, of_trials, held=len(specs))
            holds_all = as_many == places
            plan = holding if holds_all else plan
    captured: ExecutionPlan | None = None
    with suppress(WontFit):
        captured = make(spec_of_pass(spec, places, captured=True), of_trials(len(specs) if holds_all else places))
    plan = replayed(spec, plan, captured)
    if places < at_once:
        log.info(f"{places} of {at_once} trials train at the same time: more rows do not fit into a pass")
    in_places = trained(places)
    if plan.predicted_peak_memory_bytes and in_places:
        more = plan.predicted_peak_memory_bytes + BYTES_IN_PLACE * in_places
        plan = plan.model_copy(update={"predicted_peak_memory_bytes": more})
    return Fit(places, plan, holds_all)


def _places(
    at_once: int, make: Make, spec: FineTuneJobSpec, of_trials: Callable[[int], BaseModel], held: int = 0
) -> tuple[int, ExecutionPlan]:
    """Return how many places fit, beside the adapters of `held` trials in all, and the plan of their passes."""
    places = at_once
    while True:
        plan: ExecutionPlan | None = None
        try:
            plan = make(spec_of_pass(spec, places), of_trials(max(places, held)))
        except WontFit:
            if places == 1:
                raise
        fewer = fewer_places(spec, places, plan)
        if plan is not None and fewer == places:
            return places, plan
        places = fewer


def _with_trials(base: BaseModel, trained: Callable[[int], int | None], trials: int) -> BaseModel:
    """Return `base` with the trained weights of so many trials."""
    found = trained(trials)
    return replace(base, shape=replace(base.shape, trained=found)) if base.shape and found else base


def _trained(base: BaseModel, spec: FineTuneJobSpec, specs: Sequence[FineTuneJobSpec], trials: int) -> int | None:
    """Return the trained weights of the largest `trials`, given those of `spec`."""
    return weights_of_largest(base.shape, spec, specs, trials) if base.shape else None
