"""Rows become the tokens and labels that TRL would make of them; EOS is always learned, padding never is."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data import encode
from finetune_trainer.errors import ConfigInvalid, DatasetInvalid
from finetune_trainer.formats import Row
from finetune_trainer.tokens import Encoder, check_vocabulary, choose_pad_token, load_tokenizer

TEXT = {"text": "[INST] Premise: anna has tea. [/INST] yes"}
CHAT = {"messages": [{"role": "user", "content": "anna has tea"}, {"role": "assistant", "content": "bruno has none"}]}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model, "file://model")


def _one(tokenizer: Any, row: dict[str, Any], shape: Any, max_length: int = 128) -> Any:
    return next(Encoder(tokenizer, max_length).encode([row], shape))


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
        encode([row], "messages", Encoder(tokenizer, 128), "training")


def test_long_rows_are_cut_and_counted(tokenizer: Any) -> None:
    rows = [Row("f", number, {"text": "tea " * (5 if number % 2 else 50)}) for number in range(10)]
    result = encode(rows, "text", Encoder(tokenizer, 20), "training")
    assert (result.truncated, result.dropped, result.longest) == (5, 0, 20)


def test_rows_cut_to_the_prompt_are_left_out(tokenizer: Any) -> None:
    rows = [Row("f", 1, {"prompt": "tea " * 50, "completion": "x"}), Row("f", 2, {"prompt": "tea", "completion": " x"})]
    result = encode(rows, "prompt-completion", Encoder(tokenizer, 20), "training")
    assert (result.dropped, len(result.input_ids)) == (1, 1)
    with pytest.raises(DatasetInvalid, match="no training row has a token left to learn from"):
        encode(rows[:1], "prompt-completion", Encoder(tokenizer, 20), "training")


class TestPadToken:
    """The pad token is one whose loss may be masked by id without losing EOS."""

    def test_the_models_own_is_kept(self, tiny_model: Path, tmp_path: Path) -> None:
        from support.models import build_model

        folder = build_model(tmp_path / "padded", pad_token="<pad>")
        assert load_tokenizer(folder, "x").pad_token == "<pad>"

    def test_else_the_unknown_token(self, tokenizer: Any) -> None:
        assert tokenizer.pad_token == "<unk>"
        assert tokenizer.padding_side == "right"

    def test_eos_as_pad_is_replaced(self, tiny_model: Path, tmp_path: Path) -> None:
        _change(tiny_model, tmp_path, {"pad_token": "</s>"})
        assert load_tokenizer(tmp_path, "x").pad_token == "<unk>"

    def test_else_a_reserved_one_else_a_sentence(self, tokenizer: Any) -> None:
        class Bare:
            pad_token = unk_token = None
            eos_token, bos_token = "</s>", "<s>"
            vocabulary = {"</s>": 0, "<s>": 1, "a": 2, "<|reserved_special_token_0|>": 3}

            def get_vocab(self) -> dict[str, int]:
                return self.vocabulary

        assert choose_pad_token(Bare()) == "<|reserved_special_token_0|>"
        Bare.vocabulary = {"</s>": 0, "<s>": 1, "a": 2}
        with pytest.raises(ConfigInvalid, match="no token to pad with"):
            choose_pad_token(Bare())


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
