"""The base model in the wanted precision, and the adapter on it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid, first_line, reason
from finetune_trainer.runtime.precision import torch_dtype

log = structlog.get_logger(__name__)


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


@contextmanager
def quantizing_on(device: str) -> Iterator[None]:
    """Quantize to 4 bits on `device`, though the result goes to host memory: on a CPU a large model takes hours."""
    from bitsandbytes.nn import Params4bit

    original = Params4bit._quantize
    Params4bit._quantize = lambda self, target: original(self, device).to(target)
    try:
        yield
    finally:
        Params4bit._quantize = original
