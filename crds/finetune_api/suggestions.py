"""What a field that is none was probably meant to be: one of ours elsewhere, or what other trainers call it."""

from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from typing import Final

from pydantic import BaseModel

from finetune_api.crd import model_of
from finetune_api.spec import FineTuneJobSpec

#: Names of transformers, TRL, PEFT and Axolotl, without case and underscores.
_FOREIGN: Final = {
    "numtrainepochs": "training.epochs",
    "numepochs": "training.epochs",
    "lr": "training.learningRate",
    "lrscheduler": "training.scheduler",
    "lrschedulertype": "training.scheduler",
    "optim": "training.optimizer",
    "perdevicetrainbatchsize": "training.microBatchSize",
    "traindevicebatchsize": "training.microBatchSize",
    "gradientaccumulationsteps": "training.batchSize, the effective batch over all GPUs; accumulation follows from it",
    "maxseqlength": "training.maxLength",
    "maxseqlen": "training.maxLength",
    "sequencelen": "training.maxLength",
    "samplepacking": "training.packing",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "r": "lora.rank",
    "lorar": "lora.rank",
    "loraalpha": "lora.alpha",
    "loradropout": "lora.dropout",
    "loratargetmodules": "lora.targetModules",
    "usedora": "lora.dora",
    "userslora": "lora.rslora",
    "loadin4bit": "quantization.bits",
    "loadin8bit": "quantization.bits",
    "bnb4bitquanttype": "quantization.type",
    "bnb4bitusedoublequant": "quantization.doubleQuant",
    "bnb4bitcomputedtype": "quantization.computeDtype",
    "basemodel": "model.source",
    "modelnameorpath": "model.source",
    "datasets": "dataset.sources",
    "valsetsize": "dataset.evalFraction",
    "evalsteps": "evaluation.everySteps",
    "savesteps": "checkpoint.everySteps",
    "savetotallimit": "checkpoint.keep",
    "loggingsteps": "logging.everySteps",
    "outputdir": "output.uri",
}
_MOST: Final = 3


def _plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def _fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each field of the spec, without case and underscores, with its path."""
    for field in model.model_fields.values():
        here = f"{path}{field.alias}"
        yield _plain(field.alias or ""), here
        if below := model_of(field):
            yield from _fields(below, f"{here}.")


@cache
def _paths() -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name, path in _fields(FineTuneJobSpec):
        if not path.startswith("resources.affinity."):
            found[name].append(path)
    return found


def meant(name: str) -> str:
    """Return the paths that `name` probably stands for, as a phrase; empty where none is known."""
    plain = _plain(name)
    paths = [_FOREIGN[plain]] if plain in _FOREIGN else _paths().get(plain, [])[:_MOST]
    return " or ".join(f"spec.{path}" for path in paths)
