"""Rows become the tokens and labels that TRL would make of them; EOS is always learned, padding never is."""

from pathlib import Path
from typing import Any

import pytest
import structlog

from finetune_trainer.data import formats
from finetune_trainer.data.dataset import encode
from finetune_trainer.data.encoding import Encoder, RowProblem
from finetune_trainer.data.rows import Row
from finetune_trainer.data.tokenizer import load_tokenizer
from finetune_trainer.errors import DatasetInvalid

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


def test_a_template_that_never_ends_a_turn_is_said_once(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, "x")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    encoder, rows = Encoder(tokenizer, 128), [Row("f", 1, CHAT)] * 3
    with structlog.testing.capture_logs() as logs:
        encode(rows, formats.named("messages"), encoder, "training")
        encode(rows, formats.named("messages"), encoder, "evaluation")
    [warning] = [entry["event"] for entry in logs if entry["log_level"] == "warning"]
    assert warning.startswith("Chat template never writes </s>, the tokenizer's end-of-sequence token")
    with structlog.testing.capture_logs() as logs:
        encode(rows, formats.named("messages"), Encoder(load_tokenizer(tiny_model, "x"), 128), "training")
    assert not [entry for entry in logs if entry["log_level"] == "warning"]


@pytest.mark.parametrize("row", [TEXT, {"prompt": "anna has", "completion": " tea and bread"}, CHAT])
def test_everything_is_learned_where_the_job_says_so(row: dict[str, Any], tokenizer: Any) -> None:
    shape = "messages" if "messages" in row else "text" if "text" in row else "prompt-completion"
    learned = next(Encoder(tokenizer, 128, learns_all=True).encode([formats.named(shape).to_example(row)]))
    assert learned.labels == learned.input_ids == _one(tokenizer, row, shape).input_ids


def test_rows_keep_their_order_whatever_is_tokenized_together(tokenizer: Any) -> None:
    rows = [("messages", CHAT), ("text", TEXT), ("prompt-completion", {"prompt": "anna", "completion": " has"})] * 3
    rows.insert(4, ("messages", {"messages": [{"role": "system", "content": "x"}]}))
    examples = [formats.named(shape).to_example(row) for shape, row in rows]
    together = list(Encoder(tokenizer, 128).encode(examples))
    assert isinstance(together[4], RowProblem)
    assert together == [next(Encoder(tokenizer, 128).encode([example])) for example in examples]


def test_one_bos_and_one_eos_where_text_and_tokenizer_both_bring_them(tiny_model: Path) -> None:
    from tokenizers import processors

    tokenizer = load_tokenizer(tiny_model, "x")
    ids = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ids)
    for text in ("the cat sat", "<s>the cat sat</s>"):
        row = _one(tokenizer, {"text": text}, "text")
        assert [row.input_ids.count(token) for _, token in ids] == [1, 1]
        assert (row.input_ids[0], row.input_ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


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


def test_rows_of_no_tokens_are_told_from_cut_ones(tokenizer: Any) -> None:
    class Silent:
        chat_template = bos_token_id = None
        eos_token_id = 0

        def __call__(self, texts: list[str], **_: Any) -> dict[str, Any]:
            return {"input_ids": [[] for _ in texts]}

    rows = [Row("f", number, {"text": "tea"}) for number in (1, 2)]
    sentence = r"^spec\.dataset\.train: the tokenizer makes no token of what is to be learned of any training row$"
    with pytest.raises(DatasetInvalid, match=sentence):
        encode(rows, formats.named("text"), Encoder(Silent(), 20), "training")
