"""Start what a run computes with. Importable without torch, which takes seconds to import."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.runtime.early import hash_compilers
from finetune_trainer.runtime.gc import freeze_imports
from finetune_trainer.settings import Ranks

if TYPE_CHECKING:
    from finetune_trainer.runtime.device import RuntimeDevice

#: What libraries import where it is installed, and no run needs: reporting.trackers imports what a job asks for, and
#: transformers compares drafts of assisted generation with scikit-learn, and has the last three for images and sound.
#: The trainer's image lacks those, and one that was built for another torch would end every run.
_NOT_NEEDED: Final = ("comet_ml", "wandb", "sklearn", "scipy", "torchaudio", "torchvision")


def start_runtime(spec: FineTuneJobSpec, ranks: Ranks, node: str = "") -> "RuntimeDevice":
    """Import torch and the libraries on it, join the process group, check the GPUs and seed the generators.

    With several ranks this is a collective. May be called again: what has been done is kept.

    Args:
        spec: The job.
        ranks: This process among the job's.
        node: The pod's node, which should have the GPUs; '' outside a pod.

    Raises:
        ConfigInvalid: When the GPUs that the spec asks for are not there.
        GpuUnavailable: The same in a pod.
    """
    # A transformers that is imported already knows what is installed, and ends over what it cannot find then.
    needless = () if "transformers" in sys.modules else _NOT_NEEDED
    with freeze_imports(), hidden(needless):
        import peft  # noqa: F401 -- a run needs these two anyway: here their objects are frozen with the others
        from trl import SFTTrainer  # noqa: F401

        from finetune_trainer.runtime import device
    if spec.training.compile == "enabled" or (spec.resources.gpus_per_node and spec.training.compile == "auto"):
        hash_compilers()
    return device.start(spec, ranks, node)


@contextmanager
def hidden(packages: Sequence[str]) -> Iterator[None]:
    """Have what is imported in this block find none of `packages`, though they are installed."""
    mine, modules = [name for name in packages if name not in sys.modules], vars(sys)["modules"]
    modules.update(dict.fromkeys(mine))  # None is how Python is told that there is no such module
    try:
        yield
    finally:
        for name in mine:
            modules.pop(name, None)
