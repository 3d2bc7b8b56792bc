"""The base model: what cannot be trained is refused before its weights load."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model.base import inspect_base_model


@pytest.mark.parametrize(
    ("stored", "kind"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes in 8 bits"),
    ],
)
def test_a_model_that_is_quantized_already_is_refused(
    stored: dict[str, Any], kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = stored
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigInvalid, match=f"is quantized already, with {kind}; take the original weights"):
        inspect_base_model(ModelFiles(tmp_path, None), _spec(tiny_model))


def _spec(tiny_model: Path, **sections: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": f"file://{tiny_model}"},
            "dataset": {"train": "file:///x.jsonl"},
            "output": {"uri": "file:///out"},
            "training": {"maxLength": 64},
        }
        | sections
    )


_DEEP = '{"a": ' * 900 + "1" + "}" * 900


@pytest.mark.parametrize(
    "text", ["{", "{}", "[" * 100_000, _DEEP, '{"model_type": "nonsense"}', '{"model_type": "t5"}']
)
def test_a_folder_that_is_no_causal_model_is_explained(text: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigInvalid, match="is no usable causal language model"):
        inspect_base_model(ModelFiles(tmp_path, None), _spec(tiny_model))


def test_a_tokenizer_that_cannot_be_read_is_explained_in_whole_sentences(tiny_model: Path, tmp_path: Path) -> None:
    """The first line of transformers' sentence ends with a colon."""
    shutil.copy(tiny_model / "config.json", tmp_path)
    with pytest.raises(ConfigInvalid, match=r"has no usable tokenizer: it has no file of one, such as tokenizer\.json"):
        inspect_base_model(ModelFiles(tmp_path, None), _spec(tiny_model))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ConfigInvalid, match=r"has no usable tokenizer: .* one of: \(1\) a `tokenizers` library"):
        inspect_base_model(ModelFiles(tmp_path, None), _spec(tiny_model))


@pytest.mark.parametrize(
    "setting",
    [
        {"attn_implementation": "owner/kernel"},
        {"_attn_implementation": "paged|owner/kernel@main:function"},
        {"_experts_implementation": "owner/kernel"},
        {"attn_implementation": {"text_config": "owner/kernel"}},
        {"text_config": {"_attn_implementation_internal": "owner/kernel"}},
    ],
)
def test_code_that_a_models_configuration_fetches_from_the_hub_is_never_run(
    setting: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """transformers takes such a name for a kernel, and asks nobody."""
    config = json.loads((tiny_model / "config.json").read_text()) | setting
    (tmp_path / "config.json").write_text(json.dumps(config))
    trusting = {"source": f"file://{tiny_model}", "trustRemoteCode": True, "revision": "a" * 40}
    spec = _spec(tiny_model, model=trusting)
    with pytest.raises(ConfigInvalid, match=r"names code of another repository, which is never run: .*owner/kernel"):
        inspect_base_model(ModelFiles(tmp_path, None), spec)
