"""The weights of the base model, in the wanted precision."""

import copy
from pathlib import Path
from typing import Any, Final

import structlog
from safetensors import SafetensorError

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.errors import ConfigInvalid, whole_text
from finetune_trainer.model.architecture import model_class
from finetune_trainer.model.base import BaseModel
from finetune_trainer.model.checkpoint import NO_ADAPTER, check_names, check_values, finite_while_loading
from finetune_trainer.model.embeddings import grow
from finetune_trainer.model.every_linear import EightBitConfig
from finetune_trainer.model.experts import ExpertsConfig
from finetune_trainer.model.finite import sums_are_finite
from finetune_trainer.model.grouped_experts import multiply_grouped
from finetune_trainer.planning.refusals import stored_quantization
from finetune_trainer.runtime.precision import torch_dtype

log = structlog.get_logger(__name__)
#: A part of the weights that is worth a word when it stays in 16 bits.
_WORTH_A_WORD: Final = 0.3


def quantization_config(spec: FineTuneJobSpec, device: str | None = None) -> Any | None:
    """Return bitsandbytes' settings, None for 16 bits; experts are quantized too, on `device`, to 4 bits alone."""
    quantization = spec.quantization
    if quantization.bits == 4:
        return ExpertsConfig(
            quantize_on=device,
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization.type,
            bnb_4bit_use_double_quant=quantization.double_quant,
            bnb_4bit_compute_dtype=torch_dtype(quantization.compute_dtype),
        )
    return EightBitConfig() if quantization.bits == 8 else None


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
        ConfigInvalid: When the weights cannot be read, are not all of the model's, or hold NaN or infinity.
    """
    from transformers import GenerationConfig

    dtype = spec.quantization.compute_dtype if spec.quantization.bits == 16 else spec.training.precision
    config, quantization = base.config, quantization_config(spec, device)
    if base.quantized:
        config, quantization = _as_stored(config, spec), None
    try:
        model, info = model_class(config).from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=spec.model.trust_remote_code,
            quantization_config=quantization,
            dtype=torch_dtype(dtype),
            attn_implementation=plan.attention,
            device_map={"": "cpu" if plan.sharded else device},
            adapter_kwargs=NO_ADAPTER,
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        said = whole_text(error)
        raise ConfigInvalid(f"spec.model.source: the weights of {spec.model.source} cannot be read: {said}") from None
    check_names(info, spec.model.source, quiet=not base.quantized)  # else it was said before
    if finite_while_loading(base, spec) and not sums_are_finite(model, device):
        check_values(folder, spec.model.source)
    model.config.use_cache = False
    multiply_grouped(model)
    # Answers are decoded greedily, whatever the repository's generation_config.json asks for.
    model.generation_config = GenerationConfig()
    if spec.quantization.bits < 16:
        _say_what_is_not_quantized(model, spec, base.quantized)
    grow(model, base.new_tokens)
    if device == "cpu":
        keep_weights_trainable(model)
    return model


def _as_stored(config: Any, spec: FineTuneJobSpec) -> Any:
    """Return `config` for weights that are stored in 4 bits: they stay as they are, the spec says how to compute."""
    stored = dict(stored_quantization(config.to_dict(), spec))
    wanted = {"type": "bnb_4bit_quant_type", "double_quant": "bnb_4bit_use_double_quant"}
    for field, key in wanted.items():
        if stored.get(key) != getattr(spec.quantization, field):
            log.info(f"The weights are stored quantized: {key} is {stored.get(key)}, whatever spec.quantization says")
    config = copy.deepcopy(config)
    config.quantization_config = stored | {"bnb_4bit_compute_dtype": spec.quantization.compute_dtype}
    return config


def _say_what_is_not_quantized(model: Any, spec: FineTuneJobSpec, stored: bool) -> None:
    """Log the experts that stay as they are though they are most of the bytes, and why."""
    experts = [each for each in model.parameters() if each.dim() >= 3 and each.is_floating_point()]
    size, total = (sum(each.nbytes for each in group) for group in (experts, model.parameters()))
    if size > _WORTH_A_WORD * total:
        why = "this model's code multiplies them itself, or their matrices are not of whole blocks"
        if stored or spec.quantization.bits == 8:
            why = "so they are stored" if stored else "LLM.int8 is for linear layers alone"
        log.warning(
            f"spec.quantization.bits: {spec.quantization.bits}, but {size / total:.0%} of the bytes are experts, which"
            f" stay in 16 bits ({size / (1 << 30):.1f} GiB): {why}"
        )


def keep_weights_trainable(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in the first evaluation on CPUs with AVX512-BF16.

    The repacked form has no backward pass: training after an evaluation would silently lose all gradients that go
    through those layers (bitsandbytes 0.50).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
