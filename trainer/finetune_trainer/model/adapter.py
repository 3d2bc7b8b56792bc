"""The LoRA adapter on a model: attached, continued, saved and loaded."""

import copy
import json
from pathlib import Path
from typing import Any, Final

import structlog

from finetune_api import constants
from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_training import Lora
from finetune_trainer.errors import ConfigInvalid, first_line
from finetune_trainer.model.base import BaseModel
from finetune_trainer.model.experts import attaching_adapters
from finetune_trainer.model.targets import ALL_LINEAR, drop_inputs

log = structlog.get_logger(__name__)
#: Settings of PEFT that change what weights of the same names and shapes compute.
_COMPUTES_OTHERWISE: Final = ("layer_replication", "alora_invocation_tokens")
#: How PEFT may begin an adapter without a change to the base's own weights, unlike PiSSA, OLoRA, CorDA and LoftQ.
_LEAVES_THE_BASE: Final = (None, True, False, "gaussian", "eva", "orthogonal")


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
    if (kind := found.get("peft_type", "LORA")) != "LORA":
        raise ConfigInvalid(f"spec.lora.initFrom: the adapter is of peft_type {kind!r:.40}; it must be LORA")
    for key in _COMPUTES_OTHERWISE:
        if found.get(key):
            raise ConfigInvalid(f"spec.lora.initFrom: the adapter has {key}, which this job would not compute")
    if (begun := found.get("init_lora_weights")) not in _LEAVES_THE_BASE:
        raise ConfigInvalid(
            f"spec.lora.initFrom: the adapter began as {begun!r:.40}, which changes the base's weights: "
            "convert it to plain LoRA (PEFT: path_initial_model_for_weight_conversion)"
        )
    lora = spec.lora
    targets = found.get("target_modules")
    expected: dict[str, tuple[Any, Any]] = {
        "rank": (found.get("r"), lora.rank),
        "alpha": (found.get("lora_alpha"), lora.alpha),
        "rslora": (bool(found.get("use_rslora")), lora.rslora),
        "dora": (bool(found.get("use_dora")), lora.dora),
    }
    if not lora.target_pattern and lora.target_modules != [ALL_LINEAR] and isinstance(targets, list):
        expected["targetModules"] = (sorted(map(str, targets)), sorted(lora.target_modules))
    for field, (theirs, ours) in expected.items():
        if theirs != ours:
            raise ConfigInvalid(f"spec.lora.{field}: {ours}, but the adapter at spec.lora.initFrom has {theirs}")


def attach_adapter(model: Any, base: BaseModel, lora: Lora, init_from: Path | None = None) -> Any:
    """Attach a LoRA adapter to the base model; what trains is float32.

    Args:
        model: The base model of transformers, with its weights.
        base: What is known of it, with PEFT's settings.
        lora: spec.lora.
        init_from: The folder of an adapter to begin with; None begins with a new one.

    Returns:
        The PEFT model.
    """
    from peft import get_peft_model

    with attaching_adapters(model):
        adapted = get_peft_model(model, copy.deepcopy(base.adapter))
    # get_peft_model writes the folder the base was loaded from into the config.
    adapted.peft_config["default"].base_model_name_or_path = base.name
    if lora.dropout and not base.adapter.lora_dropout:
        drop_inputs(adapted, lora.dropout)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if init_from is not None:
        _check_scales(adapted.peft_config["default"].alpha_pattern, init_from)
        load_adapter_weights(adapted, init_from)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    log.info(f"Adapter attached: {trainable:,} trainable parameters", trainable=trainable, rank=lora.rank)
    return adapted


def _check_scales(ours: dict[str, Any], folder: Path) -> None:
    """Check that the earlier adapter scales each layer as this one; of ranks, the weights' shapes tell."""
    theirs = json.loads((folder / constants.ADAPTER_CONFIG_FILE).read_bytes()).get("alpha_pattern") or {}
    if theirs != ours:
        raise ConfigInvalid(
            "spec.lora.initFrom: the adapter has an alpha_pattern, alphas of single layers, that this job has not"
        )


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
    missing = [name for name in result.missing_keys if "lora_" in name or "modules_to_save" in name]
    missing += [name for name in result.unexpected_keys if not _does_nothing(name, weights)]
    if missing:
        wrong = missing[0]
        raise ConfigInvalid(f"the adapter in {folder} does not fit: its layers differ, for example at {wrong}")


def _does_nothing(name: str, weights: dict[str, Any]) -> bool:
    """Return whether the tensor `name` is of an adapter whose second matrix is zero, as one that no gradient reached.

    Others put adapters on layers that get none here (see model.reach).
    """
    layer, found, _ = name.partition(".lora_")
    second = weights.get(f"{layer}.lora_B.weight")
    return bool(found) and second is not None and not second.any()


def detach_adapter(adapted: Any) -> Any:
    """Return the base model of the PEFT model as it was before: PEFT leaves modules in it that were trained whole."""
    from peft.utils import ModulesToSaveWrapper

    originals = {
        name: module.original_module
        for name, module in adapted.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base = adapted.unload()
    for name, module in originals.items():
        base.set_submodule(name, module)
    return base


def adapter_weights(model: Any) -> dict[str, Any]:
    """Return what is saved of the adapter, on the CPU."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: weight.detach().cpu() for name, weight in weights.items()}


def unreached(model: Any) -> list[str]:
    """Return the adapters that no gradient has reached: their second matrix is zero, as it began, and others moved.

    Where none has moved nothing is known: the learning rate may have been zero, as in the first step of a warm-up.
    """
    second = {name: each for name, each in model.named_parameters() if each.requires_grad and "lora_B" in name}
    zero = [name for name, each in second.items() if not each.any()]
    return zero if len(zero) < len(second) else []


def save_adapter(model: Any, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    Embeddings that train are in modules_to_save; saying so keeps PEFT from asking the hub about others.
    """
    model.create_or_update_model_card = lambda output_dir: None  # a template that takes PEFT as long as the weights
    model.save_pretrained(str(folder), save_embedding_layers=False)
