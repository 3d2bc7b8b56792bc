"""How the trials of a pack are laid out in passes: whole steps of as many of them as fit. Torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.planning.memory import OPTIMIZER_BYTES, adapter_weights
from finetune_trainer.planning.model_shape import ModelShape

_LAYOUT: Final = (
    "micro_batch_size",
    "cached_layers",
    "gradient_checkpointing",
    "checkpointed_layers",
    "selective_checkpointing",
    "compiled",
)
#: Bytes of a trained weight among those of all places: itself and its gradient, in 16 bits.
_BYTES_IN_PLACE: Final = 4
#: Returns the plan of passes of so many places, beside the adapters of so many trials in all, with CUDA graphs or
#: without; None where nothing fits.
PlanFor = Callable[[int, int, bool], ExecutionPlan | None]


@dataclass(frozen=True)
class Fit:
    """What fits.

    Attributes:
        places: Trials that train at the same time.
        plan: Of their passes; None if not even one fits.
        holds_all: Whether there is memory for the adapters of all trials, so that those that wait keep theirs.
    """

    places: int
    plan: ExecutionPlan | None
    holds_all: bool


def fit(
    specs: Sequence[FineTuneJobSpec],
    at_once: int,
    halves: bool,
    plan_for: PlanFor,
    weights_in: Callable[[int], int | None],
) -> Fit:
    """Return how many trials train at the same time, where a whole step of each fits into its place if it can.

    Args:
        specs: Those of all trials.
        at_once: How many train at the same time at most.
        halves: Whether trials wait for each other at rungs.
        plan_for: Plans passes.
        weights_in: Returns the trained weights of so many trials; None where that is not known.
    """
    spec = specs[0]
    places, plan = _places(spec, at_once, 0, plan_for)
    if plan is None:
        return Fit(places, None, False)
    as_many, holding = _places(spec, at_once, len(specs), plan_for) if halves else (0, None)
    holds_all = holding is not None and as_many == places
    plan = holding if holding and holds_all else plan
    plan = _replayed(spec, plan, plan_for(places, len(specs) if holds_all else 0, True))
    weights = weights_in(places)
    if plan.predicted_peak_memory_bytes and weights:
        more = plan.predicted_peak_memory_bytes + _BYTES_IN_PLACE * weights
        plan = plan.model_copy(update={"predicted_peak_memory_bytes": more})
    return Fit(places, plan, holds_all)


def _places(spec: FineTuneJobSpec, at_once: int, held: int, plan_for: PlanFor) -> tuple[int, ExecutionPlan | None]:
    places = at_once
    while True:
        plan = plan_for(places, held, False)
        fewer = _fewer_places(spec, places, plan)
        if fewer == places:
            return places, plan
        places = fewer


def spec_of_largest(specs: Sequence[FineTuneJobSpec]) -> FineTuneJobSpec:
    """Return the spec of a trial that takes as much memory as any of `specs`.

    With it the plan is the same whichever trial asks first: after a kill that is another one.
    """
    first, loras = specs[0], [spec.lora for spec in specs]
    names = sorted({name for lora in loras for name in lora.target_modules})
    lora = {
        "rank": max(lora.rank for lora in loras),
        "dropout": max(lora.dropout for lora in loras),
        "target_modules": ["all-linear"] if "all-linear" in names else names,
    }
    optimizer = max((spec.training.optimizer for spec in specs), key=lambda name: OPTIMIZER_BYTES[name])
    training = first.training.model_copy(update={"optimizer": optimizer})
    return first.model_copy(update={"lora": first.lora.model_copy(update=lora), "training": training})


def weights_of_largest(
    shape: ModelShape, spec: FineTuneJobSpec, specs: Sequence[FineTuneJobSpec], trials: int
) -> int | None:
    """Return the trained weights of the largest `trials` of `specs`, where `shape` counts those of `spec`."""
    plain = replace(shape, trained=None)
    sizes = sorted((adapter_weights(plain, each) for each in specs), reverse=True)
    own = adapter_weights(plain, spec)
    return shape.trained and (shape.trained * sum(sizes[:trials]) // own if own else shape.trained * trials)


def spec_of_pass(spec: FineTuneJobSpec, places: int, captured: bool = False) -> FineTuneJobSpec:
    """Return the spec of a job whose steps are passes of `places` trials that are like `spec`."""
    asked, rows = spec.training.micro_batch_size, spec.training.batch_size
    changed = {
        "batch_size": places * rows,
        "micro_batch_size": asked if asked == "auto" else places * int(asked),
        "cuda_graphs": "enabled" if captured else "disabled",
    }
    return spec.model_copy(update={"training": spec.training.model_copy(update=changed)})


def _fewer_places(spec: FineTuneJobSpec, places: int, plan: ExecutionPlan | None) -> int:
    """Return for how many places to plan next; `places` if they fit.

    Args:
        spec: That of a trial.
        places: For which `plan` was made.
        plan: None if nothing fits.
    """
    if places == 1:
        return 1
    if plan is None:
        return (places + 1) // 2
    asked = spec.training.micro_batch_size
    fitting = (plan.micro_batch_size or 1) // (spec.training.batch_size if asked == "auto" else int(asked))
    return places if fitting >= places or plan.predicted_peak_memory_bytes is None else max(1, fitting)


def _replayed(spec: FineTuneJobSpec, plan: ExecutionPlan, captured: ExecutionPlan | None) -> ExecutionPlan:
    """Return `captured`, a plan with CUDA graphs, if it is laid out as `plan` and graphs are not switched off.

    Passes of all trials rarely need them; those of the last trials left do.
    """
    if captured is None or not captured.captured or spec.training.cuda_graphs == "disabled":
        return plan
    return captured if all(getattr(captured, name) == getattr(plan, name) for name in _LAYOUT) else plan
