"""How the trials of a pack are laid out in passes: whole steps of as many of them as fit. Torch-free."""

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan

#: Bytes of a trained weight among those of all places: itself and its gradient, in 16 bits.
BYTES_IN_PLACE = 4


def spec_of_pass(spec: FineTuneJobSpec, places: int) -> FineTuneJobSpec:
    """Return the spec of a job whose steps are passes of `places` trials that are like `spec`."""
    asked, rows = spec.training.micro_batch_size, spec.training.batch_size
    changed = {
        "batch_size": places * rows,
        "micro_batch_size": asked if asked == "auto" else places * int(asked),
        "cuda_graphs": "disabled",  # places empty and fill while passes run
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
