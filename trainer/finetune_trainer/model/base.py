"""The base model: what is known before its weights, and its weights in the wanted precision."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.tokenizer import check_vocabulary, load_tokenizer
from finetune_trainer.errors import ConfigInvalid, first_line, reason
from finetune_trainer.inputs import ModelFiles, base_model_id
from finetune_trainer.model.adapter import check_target_modules
from finetune_trainer.planning.memory import ModelShape
from finetune_trainer.runtime.patches import quantizing_on
from finetune_trainer.runtime.precision import torch_dtype

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """What is known of a base model before its weights are loaded.

    Attributes:
        name: What a server calls it: the hub's id, else its URI; never a path of this machine.
        commit: The hub's commit, None for other sources.
        config: transformers' configuration.
        tokenizer: Set up for training: right padding, a pad token that is never EOS.
        shape: The sizes that memory and time follow from; None for an architecture that they do not describe (MoE).
        linear_layers: The full names of its linear layers, without the head.
        open_attention: Whether its code leaves attention to transformers, so that another implementation can be used.
    """

    name: str
    commit: str | None
    config: Any
    tokenizer: Any
    shape: ModelShape | None
    linear_layers: tuple[str, ...]
    open_attention: bool


def inspect_base_model(files: ModelFiles, spec: FineTuneJobSpec) -> BaseModel:
    """Read configuration and tokenizer, and check what the spec asks for against them.

    The model is laid out without memory, so that names can be checked before weights are loaded.

    Args:
        files: The model's folder, which needs no weights yet, and its commit.
        spec: The job's spec.

    Raises:
        ConfigInvalid: For a model that is no causal language model, is quantized already, is too short for
            training.maxLength, has no usable tokenizer or fewer embeddings than that has tokens, or lacks the layers
            in lora.targetModules.
    """
    source = spec.model.source
    config, skeleton = _read_config(files.folder, spec)
    if getattr(config, "quantization_config", None):
        raise ConfigInvalid(f"spec.model.source: {source} is quantized already; take the original weights")
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions and spec.training.max_length > positions:
        raise ConfigInvalid(
            f"spec.training.maxLength: {spec.training.max_length} is more than the {positions} positions of {source}"
        )
    tokenizer = load_tokenizer(files.folder, source, spec.model.trust_remote_code)
    check_vocabulary(tokenizer, text.vocab_size)
    linear_layers = _linear_layers(skeleton)
    check_target_modules(spec.lora.target_modules, linear_layers)
    return BaseModel(
        name=base_model_id(source),
        commit=files.revision,
        config=config,
        tokenizer=tokenizer,
        shape=ModelShape.from_config(config.to_dict()),
        linear_layers=linear_layers,
        open_attention=bool(skeleton._supports_attention_backend),
    )


def _read_config(folder: Path, spec: FineTuneJobSpec) -> tuple[Any, Any]:
    """Return the configuration in `folder`, and its model on the meta device."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=spec.model.trust_remote_code
        )
        return config, layout(config, spec)
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise ConfigInvalid(
            f"spec.model.source: {spec.model.source} is no usable causal language model: {reason(error)}"
        ) from None


def _linear_layers(model: Any) -> tuple[str, ...]:
    import torch

    head = model.get_output_embeddings()
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head
    )


def layout(config: Any, spec: FineTuneJobSpec) -> Any:
    """Return the model of `config` without memory: its modules, on torch's meta device."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=spec.model.trust_remote_code)


def quantization_config(spec: FineTuneJobSpec, to_be_sharded: bool = False) -> Any | None:
    """Return bitsandbytes' settings, None for 16 bits.

    4-bit weights to be sharded are stored as bfloat16: torch 2.11 shards floating-point weights only.
    """
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


def load_base_model(folder: Path, base: BaseModel, spec: FineTuneJobSpec, plan: ExecutionPlan, device: str) -> Any:
    """Load the frozen weights onto `device`. What is not quantized is kept in training.precision's type.

    Weights to be sharded are left in host memory, for the device cannot hold them all. Only safetensors are read:
    other formats can run code.

    Args:
        folder: The model's folder, weights included.
        base: What is known of the model.
        spec: The job's spec.
        plan: The execution plan: attention, and whether weights are sharded.
        device: torch's name of the device.

    Raises:
        ConfigInvalid: When the weights cannot be read.
    """
    from transformers import AutoModelForCausalLM

    dtype = spec.quantization.compute_dtype if spec.quantization.bits == 16 else spec.training.precision
    try:
        with quantizing_on(device) if plan.sharded else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=base.config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=spec.model.trust_remote_code,
                quantization_config=quantization_config(spec, to_be_sharded=bool(plan.sharded)),
                dtype=torch_dtype(dtype),
                attn_implementation=plan.attention,
                device_map={"": "cpu" if plan.sharded else device},
            )
    except OSError as error:
        said = first_line(error)
        raise ConfigInvalid(f"spec.model.source: the weights of {spec.model.source} cannot be read: {said}") from None
    model.config.use_cache = False
    if device == "cpu":
        keep_weights_trainable(model)
    return model


def keep_weights_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on CPUs with AVX512-BF16.

    The repacked form has no backward pass: training after an evaluation would silently lose all gradients that go
    through those layers (bitsandbytes 0.50).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
