"""A GGUF file computes what the adapter on its base computes; transformers, which reads such files itself, says so."""

from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model.base import BaseModel, inspect_base_model
from finetune_trainer.publishing.artifact import VerificationFailed
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.export import check_exports
from support.trainer.adapted import GGUF_FAMILIES, adapted_spec, exported_to_gguf, family, logits

gguf = pytest.importorskip("gguf", reason="gguf is not installed: make test installs it")

#: What may be left of the adapter's effect; q4_0 rounds much of so small a model.
SHARE = {"f16": 0.02, "q8_0": 0.04, "q4_0": 0.35}


class Meter:
    """A number that every logit counts in."""

    def own_loss_of(self, model: Any) -> float:
        return float(logits(model).double().logsumexp(-1).mean())

    loss_of = own_loss_of


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        ("llama 3.1", "q8_0"),
        ("qwen3", "q4_0"),
        ("gemma2", "f16"),
        *(pytest.param(name, "f16", marks=pytest.mark.nightly) for name in GGUF_FAMILIES if name != "gemma2"),
    ],
)
def test_transformers_computes_the_same_of_the_file(
    name: str, quantization: str, tiny_model: Path, tmp_path: Path
) -> None:
    from finetune_trainer.publishing.artifacts.gguf import _loaded

    made, folder = exported_to_gguf(name, quantization, tiny_model, tmp_path)
    losses = ARTIFACTS["Gguf"].make_check(made, Meter())(folder, "hand")
    assert losses is not None
    ARTIFACTS["Gguf"].load(folder, "hand")
    expected, found = logits(made.model), logits(_loaded(made, folder, "cpu"))
    with made.model.disable_adapter():
        change = (logits(made.model) - expected).abs().max()
    assert (found - expected).abs().max() < SHARE[quantization] * change


def test_the_file_holds_sizes_tokens_and_the_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    made, folder = exported_to_gguf("llama", "q4_0", tiny_model, tmp_path)
    reader = gguf.GGUFReader(folder / "model.gguf")
    found = {name: field.contents() for name, field in reader.fields.items()}
    config, tokenizer = made.base.config, made.base.tokenizer
    assert found["general.architecture"] == "llama"
    assert found["llama.context_length"] == config.max_position_embeddings
    assert found["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert found["tokenizer.ggml.pre"] == "gpt-2"
    assert found["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert found["tokenizer.ggml.add_bos_token"] is True
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_0"
    assert types["token_embd.weight"] == types["output.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"
    assert (folder / "Modelfile").read_text().startswith("FROM ./model.gguf\n")


def test_a_file_that_differs_is_not_published(tiny_model: Path, tmp_path: Path) -> None:
    made, folder = exported_to_gguf("llama", "q8_0", tiny_model, tmp_path)
    file = folder / "model.gguf"
    check = ARTIFACTS["Gguf"].make_check(made, Meter())
    place = next(each for each in gguf.GGUFReader(file).tensors if each.name == "blk.1.ffn_down.weight")
    data = bytearray(file.read_bytes())
    data[place.data_offset + 1] ^= 0x40  # the scale of one block of 32 numbers
    file.write_bytes(data)
    with pytest.raises(VerificationFailed, match=r"^blk\.1\.ffn_down\.weight of the file at hand, read back, differs"):
        check(folder, "hand")


def test_rows_of_a_length_that_is_no_whole_number_of_blocks_keep_16_bits(tiny_model: Path, tmp_path: Path) -> None:
    from finetune_trainer.publishing.gguf.convert import _type_of

    assert _type_of("blk.0.ffn_down.weight", (64, 48), "q8_0").name == "F16"
    assert _type_of("blk.0.ffn_down.weight", (64, 64), "q8_0").name == "Q8_0"


def test_a_model_that_llama_cpp_does_not_know_is_refused_before_training(tiny_model: Path, tmp_path: Path) -> None:
    source = family("gpt2", tiny_model, tmp_path / "base")
    output = {"uri": "file:///out", "artifacts": ["merged", "gguf"]}
    spec = adapted_spec(source, lora={"targetModules": ["c_attn"]}, output=output)
    refusal = r"^spec\.output\.artifacts: gguf: models of type gpt2 are not converted to GGUF; types that are: llama, "
    with pytest.raises(ConfigInvalid, match=refusal):
        inspect_base_model(ModelFiles(source, None), spec)


def test_a_tokenizer_that_it_would_read_otherwise_is_refused(tiny_model: Path) -> None:
    from tokenizers import pre_tokenizers

    spec = adapted_spec(tiny_model, output={"uri": "file:///out", "artifacts": ["gguf"]})
    base: BaseModel = inspect_base_model(ModelFiles(tiny_model, None), spec)
    check_exports(tiny_model, base, spec)
    base.tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ConfigInvalid, match=r"^spec\.output\.artifacts: gguf: the rule by which this tokenizer splits"):
        check_exports(tiny_model, base, spec)


def test_a_chat_template_whose_tokens_take_spaces_is_refused_for_conversations_alone(tiny_model: Path) -> None:
    from tokenizers import AddedToken

    output = {"uri": "file:///out", "artifacts": ["gguf"]}
    spec = adapted_spec(tiny_model, output=output)
    base: BaseModel = inspect_base_model(ModelFiles(tiny_model, None), spec)
    token = AddedToken("Z", special=True, rstrip=True)  # one that it has: the model has no room for more
    base.tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    base.tokenizer.chat_template = "{% for m in messages %}Z {{ m.content }}{% endfor %}"
    with pytest.raises(ConfigInvalid, match=r"^spec\.output\.artifacts: gguf: the token 'Z' takes the spaces"):
        check_exports(tiny_model, base, spec)
    texts = {"train": "file:///x.jsonl", "format": "text"}
    check_exports(tiny_model, base, adapted_spec(tiny_model, output=output, dataset=texts))
