"""Which trials can train in one process, over one frozen base model: those that differ in what an adapter owns. Pure.

Two trials share passes, data and the base's weights, so all that decides those must be the same.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from finetune_api.spec import FineTuneJobSpec
from finetune_api.sweep import FineTuneSweepSpec

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
)


#: Of a sweep whose trials cannot share a process, whatever they are.
DRAWN_LATER: Final = "spec.strategy: tpe draws a trial's values when it starts, from the results of others"


def why_not_packed(sweep: FineTuneSweepSpec, trials: Sequence[tuple[str, FineTuneJobSpec]]) -> str | None:
    """Return why the `trials` of `sweep`, names and specs, cannot train in one process; None if they can."""
    first = _shared(trials[0][1])
    for name, spec in trials:
        for field, is_beyond, why in _BEYOND:
            if is_beyond(spec):
                return f"trial {name}: spec.{field}: {why}"
        if (spec.dataset.eval_fraction or spec.dataset.sources) and spec.training.seed != trials[0][1].training.seed:
            return f"trial {name}: spec.training.seed differs, and it chooses rows of dataset.evalFraction and sources"
        other = _shared(spec)
        differing = sorted(path for path in first.keys() | other.keys() if first.get(path) != other.get(path))
        if differing:
            return (
                f"trial {name}: spec.{differing[0]} differs from that of {trials[0][0]}; packed trials differ in lora,"
                " the optimizer's fields of training, and where they publish"
            )
    return None


def trial_log(termination_log: Path, trial: str) -> Path:
    """Return where the last report of `trial` goes, beside that of the whole process."""
    return termination_log.with_name(f"{termination_log.name}.{trial}")


def _shared(spec: FineTuneJobSpec) -> dict[str, Any]:
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
