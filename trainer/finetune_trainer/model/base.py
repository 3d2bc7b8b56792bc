"""The base model: what is known before its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.data.tokenizer import add_tokens, check_vocabulary, load_tokenizer
from finetune_trainer.inputs import ModelFiles, base_model_id
from finetune_trainer.model.architecture import layout, linear_layers, read_config
from finetune_trainer.model.counts import count_weights
from finetune_trainer.model.embeddings import NewTokens, grow
from finetune_trainer.model.targets import adapter_settings, check_trained_whole
from finetune_trainer.planning.model_shape import ModelShape
from finetune_trainer.planning.refusals import check_config


@dataclass(frozen=True)
class BaseModel:
    """What is known of a base model before its weights are loaded.

    Attributes:
        name: What a server calls it: the hub's id, else its URI; never a path of this machine.
        commit: The hub's commit, None for other sources.
        config: transformers' configuration.
        tokenizer: Set up for training: right padding, a pad token that is never EOS.
        shape: The sizes that memory and time follow from; None for an architecture that they do not describe (MoE).
        linear_layers: The full names of its linear layers, without the head and without what is no language model.
        open_attention: Whether its code leaves attention to transformers, so that another implementation can be used.
        attention: The implementation that transformers itself takes for it.
        quantized: Whether its weights are stored in bitsandbytes' 4 bits.
        adapter: PEFT's settings of the adapter on it.
        tensors: Names and shapes of what is saved of the adapter.
        new_tokens: Tokens of `tokenizer` that the base model was not trained on.
    """

    name: str
    commit: str | None
    config: Any
    tokenizer: Any
    shape: ModelShape | None
    linear_layers: tuple[str, ...]
    open_attention: bool
    attention: str = "sdpa"
    quantized: bool = False
    adapter: Any = None
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    new_tokens: NewTokens = field(default_factory=NewTokens)

    def attention_problem(self, name: str, spec: FineTuneJobSpec) -> str | None:
        """Return why transformers does not run this model with the attention implementation `name`, None if it does."""
        try:
            layout(self.config, spec, name)
        except (ValueError, ImportError):
            return f"is not supported by models of type {self.config.model_type}"
        return None


def inspect_base_model(files: ModelFiles, spec: FineTuneJobSpec) -> BaseModel:
    """Read configuration and tokenizer, and check what the spec asks for against them.

    The model is laid out without memory, so that names can be checked before weights are loaded.

    Args:
        files: The model's folder, which needs no weights yet, and its commit.
        spec: The job's spec.

    Raises:
        ConfigInvalid: For a model that is no causal language model, is quantized in a way that cannot be trained on, is
            too short for training.maxLength, has no usable tokenizer or fewer embeddings than that has tokens, or lacks
            the layers in lora.targetModules.
    """
    source = spec.model.source
    config, skeleton = read_config(files.folder, spec)
    read = config.to_dict()
    check_config(read, spec)
    text = config.get_text_config(decoder=True)
    tokenizer = load_tokenizer(files.folder, source, spec.model.trust_remote_code)
    check_vocabulary(tokenizer, text.vocab_size)
    known = len(tokenizer)
    new = NewTokens(tuple(add_tokens(tokenizer, spec.dataset.add_tokens or ())), known, len(tokenizer))
    grow(skeleton, new)
    layers, counts = tuple(linear_layers(skeleton)), count_weights(skeleton)
    if stored := bool(read.get("quantization_config")):  # with experts as they were
        counts = replace(counts, experts=0, other=counts.other + counts.experts)
    name = base_model_id(source)
    check_trained_whole(skeleton, spec.lora, spec.quantization.bits)
    adapter, rehearsal = adapter_settings(skeleton, spec.lora, name, files.revision, new)
    return BaseModel(
        name=name,
        commit=files.revision,
        config=config,
        tokenizer=tokenizer,
        shape=ModelShape.from_config(skeleton.config.to_dict(), counts, rehearsal.trained),
        linear_layers=layers,
        open_attention=bool(skeleton._supports_attention_backend),
        attention=skeleton.config._attn_implementation or "eager",
        quantized=stored,
        adapter=adapter,
        tensors=rehearsal.tensors,
        new_tokens=new,
    )
