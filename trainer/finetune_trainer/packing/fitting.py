"""How many trials of a process train at the same time, and how their passes are laid out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import WontFit
from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning import passes
from finetune_trainer.planning.passes import Fit, spec_of_largest, spec_of_pass, weights_of_largest

log = structlog.get_logger(__name__)
#: Makes the plan of a job with this spec and base model. Also takes `attention` and `tried`, as engine.plan does.
Make = Callable[..., ExecutionPlan]


def fit(
    specs: Sequence[FineTuneJobSpec], at_once: int, halves: bool, make: Make, spec: FineTuneJobSpec, base: BaseModel
) -> Fit:
    """Return what fits; its plan is never None.

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
    largest, attention = spec_of_largest(specs), None

    def trained(trials: int) -> int | None:
        return weights_of_largest(base.shape, spec, specs, trials) if base.shape else None

    def plan_for(places: int, held: int, captured: bool) -> ExecutionPlan | None:
        nonlocal attention
        weights = trained(max(places, held))
        wide = replace(base, shape=replace(base.shape, trained=weights)) if base.shape and weights else base
        compared = bool(held) or captured
        options: dict[str, Any] = {"attention": attention, "tried": True} if compared else {}
        try:
            plan = make(spec_of_pass(largest, places, captured), wide, **options)
        except WontFit:
            if places == 1 and not compared:
                raise
            return None
        attention = plan.attention
        return plan

    found = passes.fit(specs, at_once, halves, plan_for, trained)
    if found.places < at_once:
        log.info(f"{found.places} of {at_once} trials train at the same time: more rows do not fit into a pass")
    return found
