"""The whole model, with the adapter merged into its weights: for servers and formats that know no adapters."""

import json
import shutil
from pathlib import Path
from typing import Any, Final

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.model.base import BaseModel
from finetune_trainer.publishing.artifact import Artifact, Check, Losses, LossMeter, Trained
from finetune_trainer.stores.errors import StoreCorrupted

log = structlog.get_logger(__name__)
#: What 16-bit weights may change of a loss, as a part of it: its rounding. A wrong merge changes far more.
TOLERANCE: Final = 0.02
_GENERATION: Final = "generation_config.json"


class MergedArtifact(Artifact):
    """16-bit safetensors in shards, merged in float32, with what transformers and vLLM need to load them."""

    kind = "Merged"
    required_files = ("config.json",)

    def check_makeable(self, weights: Path, base: BaseModel, spec: FineTuneJobSpec) -> None:
        from finetune_trainer.publishing.merging import check_mergeable

        check_mergeable(weights, base, spec)

    def build(self, trained: Trained, folder: Path) -> None:
        from finetune_trainer.publishing.merging import Merger, write_shards

        if trained.weights is None or trained.adapter is None:
            raise ValueError("a merge needs the base model's weights and the saved adapter")
        folder.mkdir(parents=True, exist_ok=True)
        merger = Merger(trained.weights, trained.adapter, trained.base, trained.spec, str(trained.model.device))
        size = write_shards(merger, folder, lambda done, total: log.info(f"Merged weights: file {done} of {total}"))
        config = trained.base.config.to_dict()
        for name in ("quantization_config", "torch_dtype", "_name_or_path"):
            config.pop(name, None)
        config["dtype"] = str(merger.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if (trained.weights / _GENERATION).is_file():
            shutil.copyfile(trained.weights / _GENERATION, folder / _GENERATION)
        log.info(f"The adapter is merged: {size / 2**30:.2f} GiB of 16-bit weights", bytes=size)

    def make_check(self, trained: Trained, meter: LossMeter) -> Check:
        expected = meter.own_loss_of(trained.model)
        device = str(trained.model.device)

        def check(folder: Path, where: str) -> Losses:
            from finetune_trainer.publishing.loading_back import compare_loss

            what = f"The merged model at {where}"
            return compare_loss(what, meter, expected, lambda on: _loaded(trained, folder, on), device, TOLERANCE)

        return check

    def load(self, folder: Path, where: str) -> None:
        from transformers import AutoConfig

        if not any(folder.glob("*.safetensors")) or not AutoConfig.from_pretrained(folder, local_files_only=True):
            raise StoreCorrupted(f"the merged model at {where} has no weights")


def _loaded(trained: Trained, folder: Path, device: str) -> Any:
    from finetune_trainer.model.weights import load_base_model
    from finetune_trainer.publishing.merging import output_dtype

    dtype = str(output_dtype(trained.spec)).removeprefix("torch.")
    quantization = trained.spec.quantization.model_copy(update={"bits": 16, "compute_dtype": dtype})
    spec = trained.spec.model_copy(update={"quantization": quantization})
    return load_base_model(folder, trained.base, spec, ExecutionPlan(attention=trained.base.attention), device)
