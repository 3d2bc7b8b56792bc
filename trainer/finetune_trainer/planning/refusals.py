"""What a trainer refuses by config.json alone, so that a plan can say it ahead. Pure, importable without torch."""

from collections.abc import Mapping
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid


def check_config(config: Mapping[str, Any], spec: FineTuneJobSpec) -> None:
    """Check stored quantization and the number of positions against the spec.

    Args:
        config: config.json.
        spec: The job's spec.

    Raises:
        ConfigInvalid: For weights that are quantized in a way that cannot be trained on, or have other bits than the
            spec asks for; for a model that is too short for training.maxLength.
    """
    stored_quantization(config, spec)
    text = config.get("text_config") or config
    positions = text.get("max_position_embeddings")
    if positions and spec.training.max_length > positions:
        raise ConfigInvalid(
            f"spec.training.maxLength: {spec.training.max_length} is more than the {positions} positions of"
            f" {spec.model.source}"
        )


def stored_quantization(config: Mapping[str, Any], spec: FineTuneJobSpec) -> dict[str, Any]:
    """Return how the weights are stored if they are quantized already, {} if they are not.

    Raises:
        ConfigInvalid: For all but bitsandbytes' 4 bits, and where the spec asks for other bits.
    """
    found = dict(config.get("quantization_config") or {})
    if not found:
        return {}
    source, method = spec.model.source, found.get("quant_method") or "an unknown method"
    if method != "bitsandbytes" or not found.get("load_in_4bit", found.get("_load_in_4bit")):
        kind = f"{method} in 8 bits" if method == "bitsandbytes" else method
        raise ConfigInvalid(
            f"spec.model.source: {source} is quantized already, with {kind}; take the original weights, or those of"
            " bitsandbytes in 4 bits"
        )
    if spec.quantization.bits != 4:
        raise ConfigInvalid(
            f"spec.quantization.bits: {spec.quantization.bits}, but the weights of {source} are stored in 4 bits; set 4"
        )
    return found
