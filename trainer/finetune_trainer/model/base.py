"""The base model in the wanted precision, and the adapter on it."""

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid, first_line, reason

log = structlog.get_logger(__name__)
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class BaseModel:
    """What is known of a base model before its weights: transformers' config, the names of its linear layers, and
    whether its code leaves attention to transformers, so that another implementation can be put in."""

    config: Any
    linear_layers: tuple[str, ...]
    open_attention: bool


def inspect(folder: Path, spec: FineTuneJobSpec) -> BaseModel:
    """Read config.json and lay the model out without memory, so that names can be checked before weights load.

    Raises ConfigInvalid for a model that is no causal language model, is quantized already, or is too short for
    training.maxLength.
    """
    import torch
    from transformers import AutoConfig

    source = spec.model.source
    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=spec.model.trust_remote_code
        )
        skeleton = layout(config, spec)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise ConfigInvalid(
            f"spec.model.source: {source} is no usable causal language model: {reason(error)}"
        ) from None
    if getattr(config, "quantization_config", None):
        raise ConfigInvalid(f"spec.model.source: {source} is quantized already; take the original weights")
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and spec.training.max_length > positions:
        raise ConfigInvalid(
            f"spec.training.maxLength: {spec.training.max_length} is more than the {positions} positions of {source}"
        )
    head = skeleton.get_output_embeddings()
    linear = tuple(
        name for name, module in skeleton.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    )
    return BaseModel(config, linear, bool(skeleton._supports_attention_backend))


def layout(config: Any, spec: FineTuneJobSpec) -> Any:
    """The model of `config` without memory: its modules, on torch's meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.model.trust_remote_code)


def check_target_modules(wanted: Iterable[str], linear_layers: Iterable[str]) -> None:
    """Refuse names in lora.targetModules that match no linear layer (PEFT's rule: the whole name, or its end)."""
    layers = tuple(linear_layers)
    wanted = list(wanted)
    if wanted == [ALL_LINEAR]:
        return
    known = sorted({name.rpartition(".")[2] for name in layers})
    for name in wanted:
        if name == ALL_LINEAR:
            raise ConfigInvalid(f"spec.lora.targetModules: {ALL_LINEAR} stands alone, without other names")
        if not any(layer == name or layer.endswith(f".{name}") for layer in layers):
            raise ConfigInvalid(
                f"spec.lora.targetModules: {name!r} is no linear layer of this model; it has {', '.join(known)}"
                f" (or {ALL_LINEAR})"
            )


def torch_dtype(name: str) -> Any:
    """torch's dtype for 'bf16', 'bfloat16', 'fp16', …"""
    import torch

    return {
        "bf16": torch.bfloat16,
        "fp8": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "fp16": torch.float16,
        "float16": torch.float16,
        "fp32": torch.float32,
        "float32": torch.float32,
    }[name]


def mixed_precision(device: Any, precision: str) -> Any:
    """The context in which a step of training.precision computes on `device`."""
    import torch

    dtype = {"bf16": torch.bfloat16, "fp8": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def quantization_config(spec: FineTuneJobSpec, to_be_sharded: bool = False) -> Any | None:
    """bitsandbytes' settings, None for 16 bits. torch 2.11 shards floating-point weights alone."""
    from transformers import BitsAndBytesConfig

    quantization = spec.quantization
    if quantization.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=torch_dtype(quantization.compute_dtype),
            bnb_4bit_quant_storage="bfloat16" if to_be_sharded else None,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization.bits == 8 else None


def load_base(
    folder: Path, base: BaseModel, spec: FineTuneJobSpec, attention: str, device: str, to_be_sharded: bool = False
) -> Any:
    """Load the frozen weights in `folder` onto `device`. What is not quantized is kept in training.precision's type.

    Weights `to_be_sharded` are left in host memory, for the device cannot hold them all. Only safetensors are read:
    other formats can run code.
    """
    from transformers import AutoModelForCausalLM

    from finetune_trainer.engine.fsdp import quantizing_on

    dtype = spec.quantization.compute_dtype if spec.quantization.bits == 16 else spec.training.precision
    try:
        with quantizing_on(device) if to_be_sharded else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=base.config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=spec.model.trust_remote_code,
                quantization_config=quantization_config(spec, to_be_sharded),
                dtype=torch_dtype(dtype),
                attn_implementation=attention,
                device_map={"": "cpu" if to_be_sharded else device},
            )
    except OSError as error:
        said = first_line(error)
        raise ConfigInvalid(f"spec.model.source: the weights of {spec.model.source} cannot be read: {said}") from None
    model.config.use_cache = False
    if device == "cpu":
        _keep_weights_trainable(model)
    return model


def _keep_weights_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on CPUs with AVX512-BF16.

    The repacked form has no backward pass: training after an evaluation would silently lose all gradients that go
    through those layers (bitsandbytes 0.50).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def lora_config(spec: FineTuneJobSpec, served_name: str, revision: str | None) -> Any:
    """PEFT's settings. `served_name` is what a server of the base model calls it, never a path of this machine."""
    from peft import LoraConfig

    lora = spec.lora
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
        base_model_name_or_path=served_name,
        revision=revision,
    )


def check_init_from(folder: Path, spec: FineTuneJobSpec) -> None:
    """Refuse an earlier adapter whose shape or scale is not this job's: it would compute something else here."""
    found = json.loads((folder / "adapter_config.json").read_text())
    lora = spec.lora
    targets = found.get("target_modules")
    expected = {
        "rank": (found.get("r"), lora.rank),
        "alpha": (found.get("lora_alpha"), lora.alpha),
        "rslora": (bool(found.get("use_rslora")), lora.rslora),
        "dora": (bool(found.get("use_dora")), lora.dora),
    }
    if lora.target_modules != [ALL_LINEAR] and isinstance(targets, list):
        expected["targetModules"] = (sorted(targets), sorted(lora.target_modules))
    for field, (theirs, ours) in expected.items():
        if theirs != ours:
            raise ConfigInvalid(f"spec.lora.{field}: {ours}, but the adapter at spec.lora.initFrom has {theirs}")


def attach_adapter(model: Any, config: Any, init_from: Path | None = None) -> Any:
    """Put a fresh adapter on `model`, or the one in the folder `init_from`. Adapter weights are float32."""
    from peft import get_peft_model

    name = config.base_model_name_or_path
    adapted = get_peft_model(model, config)
    # get_peft_model writes the folder the base was loaded from into the config.
    adapted.peft_config["default"].base_model_name_or_path = name
    if init_from is not None:
        load_adapter_weights(adapted, init_from)
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    log.info(f"Adapter attached: {trainable:,} trainable parameters", trainable=trainable, rank=config.r)
    return adapted


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Copy the adapter weights in `folder` into `model`'s adapter, in place: types and optimizer references stay.

    Raises ConfigInvalid when the names or shapes are not this adapter's.
    """
    from peft import set_peft_model_state_dict
    from peft.utils import load_peft_weights

    weights = load_peft_weights(str(folder), device="cpu")
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
