"""A LoRA adapter in PEFT's layout, which vLLM reads too."""

from pathlib import Path

import structlog

from finetune_api import constants
from finetune_trainer.publishing.artifact import Artifact, Check, LossMeter, Trained

log = structlog.get_logger(__name__)


class AdapterArtifact(Artifact):
    """The adapter alone; its base model is named in adapter_config.json. Imports torch once it is used."""

    kind = "Adapter"
    required_files = (constants.ADAPTER_CONFIG_FILE, constants.ADAPTER_WEIGHTS_FILE)

    def build(self, trained: Trained, folder: Path) -> None:
        from finetune_trainer.model.adapter import save_adapter, unreached

        save_adapter(trained.model, folder)
        if names := unreached(trained.model):
            log.warning(
                f"No gradient has reached {len(names)} adapters, for example {names[0]}: text does not go through those"
                " layers, leave them out with spec.lora.targetPattern"
            )

    def make_check(self, trained: Trained, meter: LossMeter) -> Check:
        from finetune_trainer.publishing.adapter_checks import compare_losses, compare_weights

        if trained.plan.sharded or trained.plan.fp8:
            return compare_weights(trained)
        return compare_losses(trained, meter)

    def load(self, folder: Path, where: str) -> None:
        from finetune_trainer.publishing.adapter_checks import load_alone

        load_alone(folder, where)
