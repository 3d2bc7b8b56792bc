"""The LoRA adapter: its configuration, its weights, and the checks on both."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import structlog

from finetune_api import constants
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_training import Lora
from finetune_trainer.errors import ConfigInvalid, first_line

log = structlog.get_logger(__name__)
ALL_LINEAR = "all-linear"


def check_target_modules(wanted: Iterable[str], linear_layers: Iterable[str]) -> None:
    """Check that each name in lora.targetModules matches a linear layer (PEFT's rule: the whole name, or its end).

    Raises:
        ConfigInvalid: Naming the first that does not, and what the model has.
    """
    layers = tuple(linear_layers)
    wanted = list(wanted)
    if wanted == [ALL_LINEAR]:
        return
    known = sorted({name.rpartition(".")[2] for name in layers})
    for name in wanted:
        if name == ALL_LINEAR:
            raise ConfigInvalid(f"spec.lora.targetModules: {ALL_LINEAR} cannot be combined with module names")
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ConfigInvalid(
                f"spec.lora.targetModules: {name!r} is no linear layer of this model; it has {', '.join(known)}"
                f" (or {ALL_LINEAR})"
            )


def lora_config(lora: Lora, base_model: str, commit: str | None) -> Any:
    """Return PEFT's settings. `base_model` is what a server calls it, never a path of this machine."""
    from peft import LoraConfig

    targets = lora.target_modules
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else list(targets),
        bias=lora.bias,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        revision=commit,
    )


def check_init_from(folder: Path, spec: FineTuneJobSpec) -> None:
    """Check that the earlier adapter in `folder` has this job's shape and scale, and so computes the same here.

    Raises:
        ConfigInvalid: Naming the first field that differs.
    """
    try:
        found = json.loads((folder / constants.ADAPTER_CONFIG_FILE).read_bytes())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ConfigInvalid(f"spec.lora.initFrom: {constants.ADAPTER_CONFIG_FILE} is no JSON object")
    lora = spec.lora
    targets = found.get("target_modules")
    expected: dict[str, tuple[Any, Any]] = {
        "rank": (found.get("r"), lora.rank),
        "alpha": (found.get("lora_alpha"), lora.alpha),
        "rslora": (bool(found.get("use_rslora")), lora.rslora),
        "dora": (bool(found.get("use_dora")), lora.dora),
    }
    if lora.target_modules != [ALL_LINEAR] and isinstance(targets, list):
        expected["targetModules"] = (sorted(map(str, targets)), sorted(lora.target_modules))
    for field, (theirs, ours) in expected.items():
        if theirs != ours:
            raise ConfigInvalid(f"spec.lora.{field}: {ours}, but the adapter at spec.lora.initFrom has {theirs}")


def attach_adapter(
    model: Any, lora: Lora, base_model: str, commit: str | None = None, init_from: Path | None = None
) -> Any:
    """Attach a LoRA adapter to the base model; its weights are float32.

    Args:
        model: The base model of transformers, with its weights.
        lora: spec.lora.
        base_model: What a server calls the base model; written into the adapter's configuration.
        commit: The base model's commit on the hub; written there too.
        init_from: The folder of an adapter to begin with; None begins with a new one.

    Returns:
        The PEFT model.
    """
    from peft import get_peft_model

    adapted = get_peft_model(model, lora_config(lora, base_model, commit))
    # get_peft_model writes the folder the base was loaded from into the config.
    adapted.peft_config["default"].base_model_name_or_path = base_model
    if init_from is not None:
        load_adapter_weights(adapted, init_from)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    log.info(f"Adapter attached: {trainable:,} trainable parameters", trainable=trainable, rank=lora.rank)
    return adapted


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Copy the adapter weights in `folder` into `model`'s adapter, in place: types and optimizer references stay.

    Raises:
        ConfigInvalid: When the names or shapes are not this adapter's.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    if not (folder / constants.ADAPTER_WEIGHTS_FILE).is_file():  # else PEFT would read a pickle, or ask the hub
        raise ConfigInvalid(f"the adapter in {folder} has no {constants.ADAPTER_WEIGHTS_FILE}")
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except SafetensorError as error:
        raise ConfigInvalid(f"the adapter in {folder} cannot be read: {first_line(error)}") from None
    try:
        result = set_peft_model_state_dict(model, weights)
    except RuntimeError as error:
        raise ConfigInvalid(f"the adapter in {folder} does not fit: {str(error).splitlines()[0]}") from None
    missing = [name for name in result.missing_keys if "lora_" in name]
    if missing or result.unexpected_keys:
        wrong = (missing or result.unexpected_keys)[0]
        raise ConfigInvalid(f"the adapter in {folder} does not fit: its layers differ, for example at {wrong}")


def save_adapter(model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Embeddings are never trained here; saying so keeps PEFT from asking the hub about them.
    """
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card
