"""A tokenizer is read from its model's files alone, whatever its settings name."""

import json
import shutil
from pathlib import Path

import pytest

from finetune_trainer.data.tokenizer_files import drop_file_names

#: What tokenizers' classes call their files.
NAMES_FILES = ("init_inputs", "vocab_file", "tokenizer_file", "merges_file", "source_spm", "vocab", "merges", "other")


@pytest.mark.parametrize("setting", NAMES_FILES)
@pytest.mark.parametrize("family", ["mistral", "bert", "gpt2"])
def test_a_file_that_the_models_author_names_is_not_read(
    family: str, setting: str, tiny_model: Path, tmp_path: Path
) -> None:
    """transformers builds a BERT tokenizer from any file: its lines would be in the published tokenizer.json."""
    from transformers import AutoTokenizer

    secret = tmp_path / "password"
    secret.write_text("CANARY\n[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n</s>\n")
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    for path, changes in {
        "config.json": {"model_type": family},
        "tokenizer_config.json": {setting: [str(secret)] if setting == "init_inputs" else str(secret)},
    }.items():
        kept = json.loads((folder / path).read_text())
        kept.pop("tokenizer_class", None)
        (folder / path).write_text(json.dumps(kept | changes))
    if family == "bert":
        (folder / "tokenizer.json").unlink()
    drop_file_names(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert str(secret) not in json.dumps(config)
    assert "eos_token" in config, "what names no file stays"
    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(tmp_path / "published")
    except (OSError, ValueError, TypeError):
        return  # there is no usable tokenizer: nothing is published
    assert all("CANARY" not in path.read_text() for path in (tmp_path / "published").iterdir())


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000])
def test_a_configuration_that_is_none_is_left_for_the_library_to_tell(content: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(content)
    drop_file_names(tmp_path)
    drop_file_names(tmp_path / "nothing")
    assert (tmp_path / "tokenizer_config.json").read_text() == content
