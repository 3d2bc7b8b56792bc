"""The tokenizer is ready for training: a pad token that is never EOS, no more tokens than embeddings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data.tokenizer import check_vocabulary, choose_pad_token, load_tokenizer
from finetune_trainer.errors import ConfigInvalid


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model, "file://model")


class TestPadToken:
    """The pad token is one whose loss may be masked by id without losing EOS."""

    def test_the_models_own_is_kept(self, tiny_model: Path, tmp_path: Path) -> None:
        from support.trainer.tiny_model import build_model

        folder = build_model(tmp_path / "padded", pad_token="<pad>")
        assert load_tokenizer(folder, "x").pad_token == "<pad>"

    def test_else_the_unknown_token(self, tokenizer: Any) -> None:
        assert tokenizer.pad_token == "<unk>"
        assert tokenizer.padding_side == "right"

    def test_eos_as_pad_is_replaced(self, tiny_model: Path, tmp_path: Path) -> None:
        _change(tiny_model, tmp_path, {"pad_token": "</s>"})
        assert load_tokenizer(tmp_path, "x").pad_token == "<unk>"

    @pytest.mark.parametrize(
        ("spare", "chosen"),
        [
            (["<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"], "<|finetune_right_pad_id|>"),
            (["<|reserved_special_token_1|>", "<|reserved_special_token_0|>"], "<|reserved_special_token_1|>"),
            (["<|im_start|>", "<|vision_pad|>"], "<|vision_pad|>"),
            (["[control_8]"], "[control_8]"),
            (["<unused0>"], "<unused0>"),
        ],
    )
    def test_else_one_that_was_set_aside(self, spare: list[str], chosen: str) -> None:
        assert choose_pad_token(_byte_level_bpe(spare)) == chosen

    @pytest.mark.parametrize("sentence", ["All rights reserved here", "unused [pad] and <pad> reserved", "a padding"])
    def test_never_a_word_of_the_language(self, sentence: str, tmp_path: Path) -> None:
        """The lowest ids with "reserved" or "unused" in them are words: as pad token they would vanish from texts."""
        _byte_level_bpe(["<|reserved_special_token_0|>"]).save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path, "x")
        vocabulary = tokenizer.get_vocab()
        assert {"Ġreserved", "Ġunused"} <= set(vocabulary), "the words are tokens of their own, with lower ids"
        assert tokenizer.pad_token == "<|reserved_special_token_0|>"
        assert tokenizer.decode(tokenizer(sentence)["input_ids"], skip_special_tokens=True) == sentence

    def test_else_the_end_of_sequence_for_labels_never_depend_on_it(self) -> None:
        """Qwen2's base, Phi-2, GPT-2, Falcon: no token to spare, and padding is masked by position."""
        assert choose_pad_token(_byte_level_bpe(["<|im_start|>", "<tool_call>"])) == "<|end_of_text|>"
        as_gpt2 = _byte_level_bpe([])
        as_gpt2.unk_token = as_gpt2.bos_token = as_gpt2.pad_token = as_gpt2.eos_token
        assert choose_pad_token(as_gpt2) == as_gpt2.eos_token


def _byte_level_bpe(spare: list[str]) -> Any:
    """A tokenizer of Llama 3's kind, without pad and unknown token: merged words first, special tokens after them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    texts = ["All rights reserved, the seats are reserved here.", "An unused [pad] is a padding of no use, unused."]
    tokenizer.train_from_iterator(texts * 50, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", *spare])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>"
    )


def test_embeddings_are_never_resized(tokenizer: Any) -> None:
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(ConfigInvalid, match=f"has {len(tokenizer)} tokens, the model's embeddings 300"):
        check_vocabulary(tokenizer, 300)


def test_a_folder_without_a_tokenizer_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigInvalid, match="s3://x/y has no usable tokenizer"):
        load_tokenizer(tmp_path, "s3://x/y")


def _change(model: Path, to: Path, changes: dict[str, Any]) -> None:
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (to / name).write_bytes((model / name).read_bytes())
    config = json.loads((model / "tokenizer_config.json").read_text()) | changes
    (to / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_tokenizer_that_its_class_rebuilds_to_nothing_is_named(tiny_model: Path, tmp_path: Path) -> None:
    _change(tiny_model, tmp_path, {"tokenizer_class": "PreTrainedTokenizerFast"})
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    _without_alphabet(tmp_path / "tokenizer.json")
    with pytest.raises(
        ConfigInvalid, match=r"s3://x/y makes no token of any text: its class, Qwen2Tokenizer, does not"
    ):
        load_tokenizer(tmp_path, "s3://x/y")


def _without_alphabet(path: Path) -> None:
    """Keep whole words only, as a word-level vocabulary does."""
    content = json.loads(path.read_text())
    content["model"] |= {"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "Hello": 3}, "merges": [], "unk_token": None}
    path.write_text(json.dumps(content))


def test_a_sentencepiece_model_alone_is_enough(tmp_path: Path) -> None:
    """Many models bring a tokenizer.model and no tokenizer.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    words = ["anna has tea", "bruno has bread", "clara watches dino"] * 20
    (tmp_path / "words.txt").write_text("\n".join(words))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "words.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=40, minloglevel=2,
        model_type="bpe", hard_vocab_limit=False,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": true}')
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    tokenizer = load_tokenizer(tmp_path, "file://model")
    ids = tokenizer("anna has tea")["input_ids"]
    assert (ids.count(tokenizer.bos_token_id), tokenizer.decode(ids, skip_special_tokens=True)) == (1, "anna has tea")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "[" * 100_000),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": ["x"]}'),
        ("tokenizer_config.json", '{"eos_token": "</s>", "model_max_length": "long"}'),
        ("special_tokens_map.json", "[]"),
        ("tokenizer.json", "[" * 100_000),
        ("config.json", '{"model_type": []}'),
        ("tokenizer_config.json", "\ufeff{}"),
    ],
)
def test_files_of_a_tokenizer_that_are_none_are_explained(
    tiny_model: Path, tmp_path: Path, file: str, content: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / file).write_text(content)
    with pytest.raises(ConfigInvalid, match=r"^spec\.model\.source: file://model has no usable tokenizer: "):
        load_tokenizer(tmp_path / "model", "file://model")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_git_pointer_in_the_place_of_a_file_is_named(file: str, tiny_model: Path, tmp_path: Path) -> None:
    """As a chat template it would be the whole text of every conversation."""
    shutil.copytree(tiny_model, tmp_path / "model")
    (tmp_path / "model" / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConfigInvalid, match=f"{file} of file://model is a Git LFS pointer, not the file it stands"):
        load_tokenizer(tmp_path / "model", "file://model")


def test_a_token_beyond_the_embeddings_is_refused_however_few_there_are(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 5000
    file.write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path / "model", "x")
    with pytest.raises(ConfigInvalid, match="has a token of the id 5000, the model's embeddings end at 399"):
        check_vocabulary(tokenizer, 400)
    check_vocabulary(tokenizer, 5001)
