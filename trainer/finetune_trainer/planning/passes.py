"""How the trials of a pack are laid out in passes: whole steps of as many of them as fit. Torch-free."""

from collections.abc import Sequence
from dataclasses import replace
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
BYTES_IN_PLACE = 4


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


def fewer_places(spec: FineTuneJobSpec, places: int, plan: ExecutionPlan | None) -> int:
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


def replayed(spec: FineTuneJobSpec, plan: ExecutionPlan, captured: ExecutionPlan | None) -> ExecutionPlan:
    """Return `captured`, a plan with CUDA graphs, if it is laid out as `plan` and graphs are not switched off.

    Passes of all trials rarely need them; those of the last trials left do.
    """
    if captured is None or not captured.captured or spec.training.cuda_graphs == "disabled":
        return plan
    return captured if all(getattr(captured, name) == getattr(plan, name) for name in _LAYOUT) else plan
