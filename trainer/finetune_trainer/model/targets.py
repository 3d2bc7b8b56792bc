"""Which layers an adapter is put on, and PEFT's settings for it, rehearsed on a model without weights."""

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog

from finetune_api.spec_training import Lora
from finetune_trainer.errors import ConfigInvalid, whole_text
from finetune_trainer.model.architecture import language_part, linear_layers, linear_modules
from finetune_trainer.model.embeddings import NewTokens, check_trained, trained_whole
from finetune_trainer.model.reach import unreached

log = structlog.get_logger(__name__)
ALL_LINEAR: Final = "all-linear"


def check_target_modules(wanted: Iterable[str], linear_layers: Iterable[str], experts: Iterable[str] = ()) -> None:
    """Check that each name in lora.targetModules matches a linear layer (PEFT's rule: the whole name, or its end).

    Args:
        wanted: The names.
        linear_layers: The full names of the model's linear layers.
        experts: Names that PEFT takes for parts of a mixture of experts.

    Raises:
        ConfigInvalid: Naming the first that does not, and what the model has.
    """
    layers, wanted, experts = tuple(linear_layers), list(wanted), sorted(experts)
    if wanted == [ALL_LINEAR]:
        return
    for name in wanted:
        if name == ALL_LINEAR:
            raise ConfigInvalid(f"spec.lora.targetModules: {ALL_LINEAR} cannot be combined with module names")
        if name not in experts and not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ConfigInvalid(
                f"spec.lora.targetModules: {name!r} is no linear layer of this model; it has"
                f" {_known(layers)}{_of_experts(experts)} (or {ALL_LINEAR})"
            )


def _known(layers: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in layers}))


def _of_experts(names: list[str]) -> str:
    return f", and in its experts {', '.join(names)}" if names else ""


@dataclass(frozen=True)
class Rehearsal:
    """What PEFT makes of the settings on a model without memory."""

    trained: int
    """How many weights train."""
    tensors: Mapping[str, tuple[int, ...]]
    """Names and shapes of what is saved of the adapter."""
    lost: tuple[str, ...]
    """Layers whose adapter is saved, and does not load back: transformers' renaming of checkpoints spoils its name."""
    base: Any
    """The model without the adapter, for another rehearsal."""


def adapter_settings(
    skeleton: Any, lora: Lora, base_model: str, commit: str | None, new: NewTokens | None = None
) -> tuple[Any, Rehearsal]:
    """Return PEFT's settings for the model of `skeleton`, and what came of a rehearsal on it.

    Args:
        skeleton: The model on the meta device; it is of no use afterwards.
        lora: spec.lora.
        base_model: What a server calls the base model, never a path of this machine.
        commit: The base model's commit on the hub.
        new: Tokens that the base model was not trained on, if there are any.

    Raises:
        ConfigInvalid: When there is nothing to put an adapter on, or PEFT does not.
    """
    from peft import LoraConfig

    layers = linear_layers(skeleton)
    targets = _targets(skeleton, lora, layers)
    _check_layers(skeleton, lora)
    _check_saved(skeleton, lora)
    whole, tied = trained_whole(skeleton, lora)
    if new and new.ids:
        check_trained(skeleton, whole)
    options = {
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "exclude_modules": "|".join([*_excluded(skeleton, layers), *unreached(skeleton, lora, layers)]) or None,
        "bias": lora.bias,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "modules_to_save": whole,
        "ensure_weight_tying": tied,
        "layers_to_transform": lora.layers_to_transform,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": commit,
    }
    try:
        settings = LoraConfig(**options)
        if lora.dropout and _reaches_experts(skeleton, settings):
            # A saved dropout would keep PEFT from loading the adapter; it is put on the other layers by hand.
            settings.lora_dropout = 0.0
            log.warning(f"spec.lora.dropout: {lora.dropout} is for linear layers alone: experts take none")
        rehearsal = _rehearse(skeleton, settings)
        if lost := rehearsal.lost:
            log.warning(
                f"spec.lora: {len(lost)} layers get no adapter, for PEFT does not load it back under their names, for"
                f" example {lost[0]}"
            )
            kept = [settings.exclude_modules] if settings.exclude_modules else []
            settings.exclude_modules = "|".join([*kept, *map(re.escape, lost)])
            rehearsal = _rehearse(rehearsal.base, settings)
    except ValueError as error:
        raise ConfigInvalid(f"spec.lora: PEFT refuses it: {whole_text(error)}") from None
    return settings, rehearsal


def _targets(skeleton: Any, lora: Lora, layers: dict[str, tuple[int, int]]) -> str | list[str]:
    if lora.target_pattern:
        return _pattern(lora.target_pattern, layers)
    check_target_modules(lora.target_modules, layers, expert_names(skeleton))
    if lora.target_modules != [ALL_LINEAR]:
        return list(lora.target_modules)
    return sorted({name.rpartition(".")[2] for name in layers}) if lora.layers_to_transform else ALL_LINEAR


def _pattern(pattern: str, layers: Iterable[str]) -> str:
    try:
        found = any(re.fullmatch(pattern, name) for name in layers)
    except re.error as error:
        raise ConfigInvalid(f"spec.lora.targetPattern: {pattern!r} is no regular expression: {error}") from None
    if not found:
        example = next(iter(layers), "")
        raise ConfigInvalid(
            f"spec.lora.targetPattern: {pattern!r} matches no linear layer of this model; a name is matched whole, such"
            f" as {example}, and it has {_known(layers)}"
        )
    return pattern


def _check_layers(skeleton: Any, lora: Lora) -> None:
    count = skeleton.config.get_text_config(decoder=True).num_hidden_layers
    beyond = [index for index in lora.layers_to_transform or () if index >= count]
    if beyond:
        raise ConfigInvalid(
            f"spec.lora.layersToTransform: {beyond[0]} is beyond the model's {count} layers, which count from 0"
        )


def _check_saved(skeleton: Any, lora: Lora) -> None:
    names = {name for name, _ in skeleton.named_modules()}
    for wanted in lora.modules_to_save or ():
        if not any(name == wanted or name.endswith(f".{wanted}") for name in names):
            top = sorted({name.rpartition(".")[2] for name in names if name.count(".") <= 1 and name})
            raise ConfigInvalid(
                f"spec.lora.modulesToSave: {wanted!r} is no module of this model; it has {', '.join(top)}"
            )


def check_trained_whole(skeleton: Any, lora: Lora, bits: int) -> None:
    """Check that no module in lora.modulesToSave holds quantized weights: those cannot train.

    Raises:
        ConfigInvalid: Naming the module, and a layer in it.
    """
    from finetune_trainer.model.experts import experts_of

    head = skeleton.get_output_embeddings()
    layers = [name for name, module in linear_modules(skeleton) if module is not head] if bits < 16 else []
    if bits == 4:
        names = {module: name for name, module in skeleton.named_modules()}
        layers += [names[module] for module, _, _ in experts_of(skeleton)]
    for wanted in lora.modules_to_save or ():
        if found := next((name for name in layers if f".{wanted}." in f".{name}."), None):
            raise ConfigInvalid(
                f"spec.lora.modulesToSave: {wanted!r} holds {found}, which is quantized to {bits} bits and cannot"
                " train; take quantization.bits: 16, or modules that are not quantized, as embed_tokens and lm_head"
            )


def expert_names(model: Any) -> frozenset[str]:
    """Return the names by which PEFT knows the parts of experts that transformers keeps as one parameter."""
    from peft.utils import transformers_weight_conversion as conversion
    from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN

    family = _MODEL_TO_CONVERSION_PATTERN.get(getattr(model.config, "model_type", None))
    return frozenset(conversion._MOE_TARGET_MODULE_MAPPING.get(family, {}))


def _reaches_experts(skeleton: Any, settings: Any) -> bool:
    """Return whether PEFT puts adapters on experts, which are parameters and no layers."""
    from peft.utils import transformers_weight_conversion as conversion

    converted = copy.deepcopy(settings)
    conversion.convert_peft_config_for_transformers(
        converted, model=skeleton, conversions=conversion.get_model_conversion_mapping(skeleton)
    )
    return bool(converted.target_parameters)


def _excluded(skeleton: Any, layers: dict[str, tuple[int, int]]) -> list[str]:
    """Return regular expressions of what gets no adapter though its name is a target's."""
    within, head = language_part(skeleton), skeleton.get_output_embeddings()
    parts = [rf"(?!{re.escape(within)}\.).*"] if within else []
    inside = (name for name, module in linear_modules(skeleton) if module is not head and name not in layers)
    ends = {name.rpartition(".")[2] for name in layers}
    for name in inside:
        end = name.rpartition(".")[2]
        if not within or name.startswith(f"{within}."):
            parts.append(re.escape(name) if end in ends else rf"(?:.*\.)?{re.escape(end)}")
    return list(dict.fromkeys(parts))


def _rehearse(skeleton: Any, settings: Any) -> Rehearsal:
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(skeleton, copy.deepcopy(settings), low_cpu_mem_usage=True)
        saved = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        missing = set_peft_model_state_dict(adapted, saved).missing_keys
    trained = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    lost = {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in missing if ".lora_" in name}
    tensors = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    return Rehearsal(trained, tensors, tuple(sorted(lost)), adapted.unload() if lost else None)


def drop_inputs(adapted: Any, dropout: float) -> None:
    """Put dropout on the inputs of all adapters of `adapted` that can have it: those on layers."""
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.tuners.lora.layer import ParamWrapper

    for module in adapted.modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            module.lora_dropout["default"] = torch.nn.Dropout(dropout)
