"""The whole model in one GGUF file, with the adapter in its weights: for llama.cpp, Ollama and what builds on them."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import structlog

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.model.base import BaseModel
from finetune_trainer.publishing.artifact import Artifact, Check, Losses, LossMeter, Trained
from finetune_trainer.stores.errors import StoreCorrupted

log = structlog.get_logger(__name__)
_FILE: Final = "model.gguf"
_MODELFILE: Final = "Modelfile"
#: What transformers does not read in a GGUF file of each architecture.
_UNREAD: Final = (
    "head_dim", "rope_parameters", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
)  # fmt: skip
#: What rounding may change of a loss, as a part of it.
_TOLERANCE: Final[Mapping[str, float]] = {"f16": 0.02, "q8_0": 0.02, "q4_0": 0.1}


class GgufArtifact(Artifact):
    """model.gguf, with tokenizer and chat template in it, and a Modelfile."""

    kind = "Gguf"
    required_files = (_FILE, _MODELFILE)

    def check_makeable(self, weights: Path, base: BaseModel, spec: FineTuneJobSpec) -> None:
        from finetune_trainer.publishing.gguf.convert import check_convertible
        from finetune_trainer.publishing.merging import check_mergeable

        if find_spec("gguf") is None:
            raise ConfigInvalid("the package gguf is not installed here (it comes with the extra 'trainer')")
        check_mergeable(weights, base, spec)
        check_convertible(weights, base, spec)

    def build(self, trained: Trained, folder: Path) -> None:
        from finetune_trainer.data.encoding import Encoder
        from finetune_trainer.data.prompt_form import trained_form
        from finetune_trainer.publishing.gguf.convert import write_gguf
        from finetune_trainer.publishing.gguf.modelfile import modelfile
        from finetune_trainer.publishing.gguf.vocabulary import sample_prompts, vocabulary_of

        base, quantization = trained.base, trained.spec.output.gguf.quantization
        tokenizer = base.tokenizer
        folder.mkdir(parents=True, exist_ok=True)
        name = base.name.rstrip("/").rpartition("/")[2] + "-finetuned"
        chat = trained_form(trained.spec, Encoder(tokenizer, max_length=1)) == "chat"
        vocabulary = vocabulary_of(tokenizer, base.config.vocab_size, sample_prompts(trained.spec, tokenizer))
        size = write_gguf(_merger(trained), base, vocabulary, name, quantization, folder / _FILE)
        text = modelfile(tokenizer, _FILE, chat=chat, adds_bos=vocabulary.adds_bos)
        (folder / _MODELFILE).write_text(text, encoding="utf-8")
        log.info(f"The adapter is merged: {size / 2**30:.2f} GiB of GGUF in {quantization}", bytes=size)

    def make_check(self, trained: Trained, meter: LossMeter) -> Check:
        expected = meter.own_loss_of(trained.model)
        device = str(trained.model.device)

        def check(folder: Path, where: str) -> Losses:
            from finetune_trainer.publishing.gguf.convert import compare_gguf
            from finetune_trainer.publishing.loading_back import compare_loss

            compare_gguf(_merger(trained), trained.base, folder / _FILE, where)
            tolerance = _TOLERANCE[trained.spec.output.gguf.quantization]
            return compare_loss(
                f"The GGUF file at {where}", meter, expected, lambda on: _loaded(trained, folder, on), device, tolerance
            )

        return check

    def load(self, folder: Path, where: str) -> None:
        import gguf

        if not gguf.GGUFReader(folder / _FILE).tensors:
            raise StoreCorrupted(f"the GGUF file at {where} holds no weights")


def _merger(trained: Trained) -> Any:
    import torch

    from finetune_trainer.publishing.merging import Merger

    if trained.weights is None or trained.adapter is None:
        raise ValueError("a merge needs the base model's weights and the saved adapter")
    device = str(trained.model.device)
    return Merger(trained.weights, trained.adapter, trained.base, trained.spec, device, torch.float32)


def _loaded(trained: Trained, folder: Path, device: str) -> Any:
    """Load the file with transformers, which reads the weights in it, but not all of the configuration."""
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune_trainer.publishing.merging import output_dtype

    config, own = AutoConfig.from_pretrained(folder, gguf_file=_FILE), trained.base.config
    for name in _UNREAD:
        if hasattr(own, name):
            setattr(config, name, getattr(own, name))
    whole = {}
    if settings := getattr(
        transformers, "GgufConfig", None
    ):  # it would leave them packed, where it has kernels for that
        whole["quantization_config"] = settings(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        folder,
        gguf_file=_FILE,
        config=config,
        dtype=output_dtype(trained.spec),
        attn_implementation=trained.base.attention,
        **whole,
        device_map={"": device},
    )
