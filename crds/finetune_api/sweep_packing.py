"""Which trials can train in one process, over one frozen base model: those that differ in what an adapter owns. Pure.

Two trials share passes, data and the base's weights, so all that decides those must be the same.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from finetune_api.spec import FineTuneJobSpec

#: What each trial of a pack may have of its own, as paths below spec.
OWN_FIELDS: Final = frozenset(
    {
        "lora.rank",
        "lora.alpha",
        "lora.dropout",
        "lora.rslora",
        "lora.targetModules",
        "lora.targetPattern",
        "lora.layersToTransform",
        "lora.initFrom",
        "training.epochs",
        "training.maxSteps",
        "training.learningRate",
        "training.scheduler",
        "training.warmupRatio",
        "training.weightDecay",
        "training.optimizer",
        "training.maxGradNorm",
        "training.seed",
        "evaluation.earlyStopping",
        "evaluation.keepBest",
        "checkpoint",
        "logging",
        "pack",
        "output.uri",
        "output.overwrite",
        "output.keepCheckpoints",
    }
)
#: What no pack can do, and how it is called.
_BEYOND: Final[tuple[tuple[str, Callable[[FineTuneJobSpec], bool], str], ...]] = (
    ("resources.nodes", lambda spec: spec.resources.nodes > 1, "packed trials share one GPU"),
    ("resources.gpusPerNode", lambda spec: spec.resources.gpus_per_node > 1, "packed trials share one GPU"),
    ("quantization.bits", lambda spec: spec.quantization.bits == 8, "LLM.int8 scales tokens of all trials together"),
    ("training.precision", lambda spec: spec.training.precision in ("fp16", "fp8"), "packed trials take bf16 or fp32"),
    ("lora.dora", lambda spec: spec.lora.dora, "only plain LoRA is packed"),
    ("lora.bias", lambda spec: spec.lora.bias != "none", "the base is shared, and its biases with it"),
    ("lora.embeddings", lambda spec: spec.lora.embeddings, "the base is shared, and its embeddings with it"),
    ("lora.modulesToSave", lambda spec: bool(spec.lora.modules_to_save), "the base is shared, whole modules with it"),
    ("dataset.addTokens", lambda spec: bool(spec.dataset.add_tokens), "the base is shared, and its embeddings with it"),
    ("output.artifacts", lambda spec: bool(spec.output.artifacts), "packed trials publish adapters alone"),
    ("logging.wandb", lambda spec: spec.logging.wandb is not None, "a process logs one run to it"),
    ("activeDeadlineSeconds", lambda spec: spec.active_deadline_seconds is not None, "it bounds one trial's time"),
)


#: Of a sweep whose trials cannot share a process, whatever they are.
DRAWN_LATER: Final = "spec.strategy: tpe draws a trial's values when it starts, from the results of others"


def why_not_packed(trials: Sequence[tuple[str, FineTuneJobSpec]]) -> str | None:
    """Return why the `trials` of a sweep, names and specs, cannot train in one process; None if they can."""
    for trial in trials:
        if why := why_never(*trial) or why_apart(trials[0], trial):
            return why
    return None


def why_never(name: str, spec: FineTuneJobSpec) -> str | None:
    """Return why a trial can train in one process with no other; None if it may."""
    return next((f"trial {name}: spec.{field}: {why}" for field, is_it, why in _BEYOND if is_it(spec)), None)


def why_apart(first: tuple[str, FineTuneJobSpec], second: tuple[str, FineTuneJobSpec]) -> str | None:
    """Return why two trials, names and specs, cannot train in one process; None if they can."""
    (one, spec), (name, other) = first, second
    if (other.dataset.eval_fraction or other.dataset.sources) and spec.training.seed != other.training.seed:
        return f"trial {name}: spec.training.seed differs, and it chooses rows of dataset.evalFraction and sources"
    mine, theirs = shared(spec), shared(other)
    differing = sorted(path for path in mine.keys() | theirs.keys() if mine.get(path) != theirs.get(path))
    if not differing:
        return None
    return (
        f"trial {name}: spec.{differing[0]} differs from that of {one}; packed trials differ in lora, the optimizer's"
        " fields of training, and where they publish"
    )


def trial_log(termination_log: Path, trial: str) -> Path:
    """Return where the last report of `trial` goes, beside that of the whole process."""
    return termination_log.with_name(f"{termination_log.name}.{trial}")


def shared(spec: FineTuneJobSpec) -> dict[str, Any]:
    """Return what trials of one process must agree on, by its path below spec."""
    return dict(_leaves(spec.manifest()))


def _leaves(value: dict[str, Any], parent: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the paths of `value` that a pack shares, each with its value."""
    for key, each in value.items():
        path = parent + key
        if path in OWN_FIELDS:
            continue
        if isinstance(each, dict):
            yield from _leaves(each, f"{path}.")
        else:
            yield path, each
