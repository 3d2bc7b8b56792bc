"""Rows become the tokens and labels that TRL would make of them; EOS is always learned, padding never is."""

import json
from pathlib import Path
from typing import Any

import pytest
import structlog

from finetune_trainer.data import formats
from finetune_trainer.data.dataset import encode
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.rows import Row
from finetune_trainer.data.tokenizer import check_vocabulary, choose_pad_token, load_tokenizer
from finetune_trainer.errors import ConfigInvalid, DatasetInvalid

TEXT = {"text": "[INST] Premise: anna has tea. [/INST] yes"}
CHAT = {"messages": [{"role": "user", "content": "anna has tea"}, {"role": "assistant", "content": "bruno has none"}]}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model, "file://model")


def _one(tokenizer: Any, row: dict[str, Any], shape: Any, max_length: int = 128) -> Any:
    return next(Encoder(tokenizer, max_length).encode([formats.named(shape).to_example(row)]))


def test_text_is_learned_whole_between_one_bos_and_one_eos(tokenizer: Any) -> None:
    row = _one(tokenizer, TEXT, "text")
    assert row.labels == row.input_ids
    assert (row.input_ids[0], row.input_ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    marked = _one(tokenizer, {"text": f"<s>{TEXT['text']}</s>"}, "text")
    assert marked.input_ids == row.input_ids


def test_only_the_completion_is_learned(tokenizer: Any) -> None:
    row = _one(tokenizer, {"prompt": "anna has tea", "completion": " and bread"}, "prompt-completion")
    learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
    assert tokenizer.decode(learned) == " and bread</s>"


def test_only_what_the_assistant_says_is_learned(tokenizer: Any) -> None:
    row = _one(tokenizer, CHAT, "messages")
    learned = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != -100]
    assert tokenizer.decode(learned).strip() == "bruno has none</s>"


@pytest.mark.parametrize("row", [TEXT, {"prompt": "anna has", "completion": " tea and bread"}, CHAT])
def test_the_result_is_trls(row: dict[str, Any], tokenizer: Any, tiny_model: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    is_chat = "messages" in row
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model),
        args=SFTConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to="none",
            assistant_only_loss=is_chat,
            max_length=128,
        ),
        train_dataset=Dataset.from_list([row]),
        processing_class=tokenizer,
    )
    shape = "messages" if is_chat else "text" if "text" in row else "prompt-completion"
    ours = _one(tokenizer, row, shape)
    assert trainer.train_dataset[0]["input_ids"] == ours.input_ids
    assert trainer.train_dataset[0]["labels"] == ours.labels


def test_a_conversation_the_template_refuses_is_a_bad_row(tokenizer: Any) -> None:
    row = Row("f.jsonl", 3, {"messages": [{"role": "system", "content": "x"}, *CHAT["messages"]]})
    with pytest.raises(DatasetInvalid, match=r"f.jsonl:3: does not fit the chat template: only user and assistant"):
        encode([row], formats.named("messages"), Encoder(tokenizer, 128), "training")


def test_a_template_that_does_not_mark_the_assistant_is_said_once(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, "x")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    encoder, rows = Encoder(tokenizer, 128), [Row("f", 1, CHAT)] * 3
    with structlog.testing.capture_logs() as logs:
        learned = encode(rows, formats.named("messages"), encoder, "training")
        encode(rows, formats.named("messages"), encoder, "evaluation")
    assert learned.labels[0] == learned.input_ids[0], "users' words are learned, too"
    [warning] = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert warning == "Chat template has no {% generation %} markers: training on all tokens, user turns included"
    with structlog.testing.capture_logs() as logs:
        encode(rows, formats.named("messages"), Encoder(load_tokenizer(tiny_model, "x"), 128), "training")
    assert not [entry for entry in logs if entry["log_level"] == "warning"]


def test_long_rows_are_cut_and_counted(tokenizer: Any) -> None:
    rows = [Row("f", number, {"text": "tea " * (5 if number % 2 else 50)}) for number in range(10)]
    result = encode(rows, formats.named("text"), Encoder(tokenizer, 20), "training")
    assert (result.truncated, result.dropped, result.longest) == (5, 0, 20)


def test_rows_cut_to_the_prompt_are_left_out(tokenizer: Any) -> None:
    rows = [Row("f", 1, {"prompt": "tea " * 50, "completion": "x"}), Row("f", 2, {"prompt": "tea", "completion": " x"})]
    result = encode(rows, formats.named("prompt-completion"), Encoder(tokenizer, 20), "training")
    assert (result.dropped, len(result.input_ids)) == (1, 1)
    with pytest.raises(DatasetInvalid, match="no training row has a token left to learn from"):
        encode(rows[:1], formats.named("prompt-completion"), Encoder(tokenizer, 20), "training")


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

    def test_else_a_sentence_never_the_end_of_sequence(self) -> None:
        with pytest.raises(ConfigInvalid, match="no token to pad with other than the end-of-sequence token"):
            choose_pad_token(_byte_level_bpe(["<|im_start|>", "<tool_call>"]))
        as_gpt2 = _byte_level_bpe([])
        as_gpt2.unk_token = as_gpt2.bos_token = as_gpt2.pad_token = as_gpt2.eos_token
        with pytest.raises(ConfigInvalid, match="no token to pad with"):
            choose_pad_token(as_gpt2)


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
