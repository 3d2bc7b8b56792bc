"""The base model: what cannot be trained is refused before its weights load."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.inputs import ModelFiles
from finetune_trainer.model.base import inspect_base_model


def test_a_model_that_is_quantized_already_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigInvalid, match="is quantized already"):
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


@pytest.mark.parametrize("text", ["{", "{}", '{"model_type": "nonsense"}', '{"model_type": "t5"}'])
def test_a_folder_that_is_no_causal_model_is_explained(text: str, tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigInvalid, match="is no usable causal language model"):
        inspect_base_model(ModelFiles(tmp_path, None), _spec(tiny_model))
