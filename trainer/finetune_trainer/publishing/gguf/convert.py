"""Write the merged weights of a model as one GGUF file, tensor by tensor, and compare the file with them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy
import structlog
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning.gguf import GGUF_TYPES, gguf_problem
from finetune_trainer.publishing.artifact import VerificationFailed
from finetune_trainer.publishing.gguf.metadata import describe, describe_tokenizer, frequency_factors
from finetune_trainer.publishing.gguf.vocabulary import Vocabulary, check_spaces, sample_prompts, vocabulary_of
from finetune_trainer.publishing.merging import Merger, tensors_of

log = structlog.get_logger(__name__)
#: The embeddings and the head take more bits than four, as llama.cpp's own tool gives them more.
_NAMES_OF_VOCABULARY: Final = ("token_embd.weight", "output.weight")
_FREQUENCIES: Final = "rope_freqs.weight"
#: What each type may change of a tensor, as a part of its length: no block of 32 numbers can lose more by rounding.
_ROUNDING: Final = {"F32": 1e-6, "F16": 1e-3, "Q8_0": 0.02, "Q4_0": 0.25}


def check_convertible(weights: Path, base: BaseModel, spec: FineTuneJobSpec) -> None:
    """Raise ConfigInvalid, with the reason, if the model in `weights` cannot become a GGUF file.

    Args:
        weights: Its folder, weights included.
        base: What is known of it.
        spec: The job's.
    """
    if problem := gguf_problem(base.config.to_dict(), spec.training.max_length):
        raise ConfigInvalid(problem)
    prompts = sample_prompts(spec, base.tokenizer)
    vocabulary_of(base.tokenizer, base.config.vocab_size, prompts)
    check_spaces(base.tokenizer, prompts)
    _names(tensors_of(weights), base.config)


def write_gguf(
    merged: Merger, base: BaseModel, vocabulary: Vocabulary, name: str, quantization: str, file: Path
) -> int:
    """Write `file`, with one tensor in memory at a time; return its bytes.

    Args:
        merged: Gives the weights, in float32.
        base: The base model, whose configuration and tokenizer the file holds.
        vocabulary: The tokenizer's, in llama.cpp's terms.
        name: The model's.
        quantization: f16, q8_0 or q4_0.
        file: Where to write.

    Raises:
        ConfigInvalid: The model, or its tokenizer, cannot be converted.
    """
    import gguf

    config = base.config
    kind = GGUF_TYPES[config.model_type]
    writer = gguf.GGUFWriter(file, kind.architecture)
    describe(writer, config, kind, name, quantization)
    describe_tokenizer(writer, vocabulary, base.tokenizer)
    names = _names(merged.tensors, config)
    factors = frequency_factors(config)
    if factors is not None:
        writer.add_tensor_info(_FREQUENCIES, factors.shape, numpy.dtype(numpy.float32), factors.nbytes)
    for tensor, info in merged.tensors.items():
        if tensor in names:
            stored, shape = _type_of(names[tensor], info.shape, quantization), info.shape
            bytes_shape = gguf.quant_shape_to_byte_shape(shape, stored)
            size = int(numpy.prod(bytes_shape))
            writer.add_tensor_info(names[tensor], shape, numpy.dtype(numpy.float32), size, raw_dtype=stored)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors.numpy())
    for tensor, values in _converted(merged, names, config):
        stored = _type_of(names[tensor], values.shape, quantization)
        writer.write_tensor_data(gguf.quants.quantize(values, stored))
    writer.close()
    return file.stat().st_size


def compare_gguf(merged: Merger, base: BaseModel, file: Path, where: str) -> None:
    """Compare every tensor of `file`, as the library reads it, with the merged weights.

    Raises:
        VerificationFailed: One is missing, or differs by more than its type rounds.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    found = {tensor.name: tensor for tensor in reader.tensors}
    names = _names(merged.tensors, base.config)
    for tensor, values in _converted(merged, names, base.config):
        stored = found.pop(names[tensor], None)
        read = gguf.quants.dequantize(stored.data, stored.tensor_type) if stored is not None else None
        if stored is None or read is None or read.shape != values.shape:
            raise VerificationFailed(f"The file at {where} lacks {names[tensor]}; it is not published")
        difference, length = numpy.linalg.norm(read - values), numpy.linalg.norm(values)
        if not difference <= _ROUNDING[stored.tensor_type.name] * length:
            raise VerificationFailed(
                f"{names[tensor]} of the file at {where}, read back, differs from the merged weights by"
                f" {difference / max(float(length), 1e-30):.1%}; it is not published"
            )
    if unknown := found.keys() - {_FREQUENCIES}:
        raise VerificationFailed(f"The file at {where} holds {min(unknown)} besides; it is not published")


def _names(tensors: Any, config: Any) -> dict[str, str]:
    """Return llama.cpp's names of a checkpoint's tensors; without those that it does not need.

    Raises:
        ConfigInvalid: It has none for one of them.
    """
    import gguf

    kind = GGUF_TYPES[config.model_type]
    architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architectures[kind.architecture], config.num_hidden_layers)
    found = {}
    for tensor in tensors:
        if tensor.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and tensor == "lm_head.weight"):
            continue
        name = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ConfigInvalid(f"llama.cpp has no place for {tensor}")
        found[tensor] = name
    return found


def _type_of(name: str, shape: tuple[int, ...], quantization: str) -> Any:
    """Return how a tensor is stored: as it was asked, where its rows are whole blocks; norms and biases in float32."""
    from gguf import GGML_QUANT_SIZES
    from gguf import GGMLQuantizationType as Type

    if len(shape) < 2:
        return Type.F32
    wanted = Type.Q8_0 if quantization == "q4_0" and name in _NAMES_OF_VOCABULARY else Type[quantization.upper()]
    block, _ = GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else Type.F16


def _converted(merged: Merger, names: dict[str, str], config: Any) -> Iterator[tuple[str, Any]]:
    """Yield each tensor that is stored, in llama.cpp's form."""
    kind = GGUF_TYPES[config.model_type]
    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    for tensor, values in merged:
        if tensor not in names:
            continue
        rotated = next((count for part, count in heads.items() if part in names[tensor]), 0)
        if kind.interleaved and rotated:
            values = _interleaved(values, rotated)
        if kind.norm_plus_one and tensor.endswith("norm.weight"):
            values = values + 1
        yield tensor, values.float().numpy()


def _interleaved(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Return the rows of each head with the two of a rotated pair side by side."""
    rows: torch.Tensor = values.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()
    return rows
