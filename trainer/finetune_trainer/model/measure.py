"""What a model and its adapter come to by config.json alone: built without memory, in seconds and without weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.model.architecture import read_config
from finetune_trainer.model.counts import count_weights
from finetune_trainer.model.embeddings import NewTokens
from finetune_trainer.model.targets import adapter_settings
from finetune_trainer.planning.model_shape import ModelShape


def measure(config: Mapping[str, Any], spec: FineTuneJobSpec) -> ModelShape | None:
    """Return the shape of the model of config.json, all its weights and the adapter's counted.

    Args:
        config: config.json; its vocabulary holds the tokens of spec.dataset.addTokens.
        spec: The job's spec.

    Returns:
        None for a model that a shape does not describe.

    Raises:
        ConfigInvalid: When the trainer would refuse the model, or what the spec asks of its layers.
    """
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        _, skeleton = read_config(Path(folder), spec)
    counts = count_weights(skeleton)
    new = NewTokens(tuple(range(len(spec.dataset.add_tokens or ()))))
    _, rehearsal = adapter_settings(skeleton, spec.lora, spec.model.source, None, new)
    return ModelShape.from_config(skeleton.config.to_dict(), counts, rehearsal.trained)
