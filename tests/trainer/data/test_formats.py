"""Each format detects its rows, explains bad ones, and one more format is one file."""

from pathlib import Path
from typing import Any, get_args

import pytest
import structlog

from finetune_api.fields import COLUMNS
from finetune_api.spec_data import Dataset
from finetune_trainer.data import formats
from finetune_trainer.data.dataset import encode
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.row_files import DataFile
from finetune_trainer.data.row_format import ChatExample, CompletionExample, TextExample
from finetune_trainer.data.rows import Row
from finetune_trainer.errors import ConfigInvalid, DatasetInvalid
from support.docs.markdown import ROOT, blocks
from support.trainer.data_files import load, read, write


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "a", "id": 1}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
         "prompt-completion"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt"),
        ({"conversations": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "sharegpt"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
    ],
)  # fmt: skip
def test_the_shape_of_rows_is_detected(row: dict[str, Any], shape: str, tmp_path: Path) -> None:
    assert load(write(tmp_path / "rows.jsonl", [row]))[1] == shape


def test_another_text_column_can_be_named(tmp_path: Path) -> None:
    assert load(write(tmp_path / "rows.csv", [{"body": "x", "id": "1"}]), text_field="body")[1] == "text"


BAD_ROWS = [
    ("text", {"text": "  "}, "'text' is empty"),
    ("text", {"text": None, "id": 3}, "'text' is null"),
    ("text", {"id": 3}, "has no column 'text'; it has 'id'"),
    ("text", ["x"], "is not a JSON object"),
    ("prompt-completion", {"prompt": "a"}, "has no column 'completion'"),
    ("prompt-completion", {"prompt": "a", "completion": []}, "must both be strings, or both lists of messages"),
    ("messages", {"messages": [{"role": "user", "content": "x"}]}, "'messages' has no assistant turn to learn from"),
    ("messages", {"messages": '[{"role": "user", "content": "x"}]'}, "with role and content, not a string"),
    ("messages", {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
     "'messages[0]'.function_call is not read: write it as tool_calls"),
    ("messages", {"messages": [{"role": "assistant", "content": " ", "refusal": "no"}]},
     "'messages' has no assistant turn that says something"),
    ("prompt-completion", {"prompt": [{"role": "user", "content": "a"}],
     "completion": [{"role": "assistant", "content": ""}]}, "'completion' is empty"),
    ("messages", {"messages": [{"role": "user", "content": "x", "weight": 2}]},
     "'messages[0]'.weight is 2; it must be 0 or 1"),
    ("messages", {"messages": [{"role": "assistant", "tool_calls": "f"}]},
     "'messages[0]'.tool_calls must be a list of objects"),
    ("messages", {"messages": [{"role": "assistant", "content": "x"}], "tools": "{"},
     "'tools' must be a list of objects"),
    ("messages", {"messages": [{"role": "assistant", "content": "x"}], "chat_template_kwargs": {"tokenize": True}},
     "'chat_template_kwargs' must not hold 'tokenize'"),
    ("sharegpt", {"conversations": "hi"}, "'conversations' must be a list of turns with from and value"),
    ("sharegpt", {"conversations": [{"from": "martian", "value": "x"}]},
     "'conversations[0]'.from is 'martian'; it must be"),
    ("sharegpt", {"conversations": [{"from": [], "value": "x"}]}, "'conversations[0]'.from is []; it must be"),
    ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "'conversations[0]'.value must be a string"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "'conversations' has no assistant turn"),
    ("sharegpt", {"conversations": [{"from": "gpt", "value": "x"}], "system": 7}, "'system' must be a string"),
    ("alpaca", {"instruction": "x", "output": ""}, "'output' is empty"),
    ("alpaca", {"instruction": "x", "input": 4, "output": "y"}, "'input' must be a string, not int"),
    ("messages", {"messages": "hi"}, "must be a list of messages"),
    ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "'messages[0]'.role is 'robot'; it must be one of"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "'messages[0]'.content must be a string"),
]  # fmt: skip


GOOD_ROWS = [
    ("messages", {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [],
                  "chat_template_kwargs": None, "parallel_tool_calls": False},
     ChatExample([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
     ChatExample([{"role": "system", "content": "s"}, {"role": "user", "content": "a"},
                  {"role": "assistant", "content": "b"}])),
    ("alpaca", {"instruction": "a {x}", "input": " ", "output": "b"},
     CompletionExample("Below is an instruction that describes a task. Write a response that appropriately completes"
                       " the request.\n\n### Instruction:\na {x}\n\n### Response:\n", "b")),
    ("alpaca", {"instruction": "a", "input": "i", "output": "b"},
     CompletionExample("Below is an instruction that describes a task, paired with an input that provides further"
                       " context. Write a response that appropriately completes the request.\n\n### Instruction:\na\n\n"
                       "### Input:\ni\n\n### Response:\n", "b")),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "data", "example"), GOOD_ROWS)
def test_a_row_becomes_an_example(shape: str, data: Any, example: Any) -> None:
    row_format = formats.named(shape)
    row = row_format.checked(Row("f.jsonl", 1, data))
    assert not row.problem
    assert row_format.to_example(row.data) == example


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b", "prompt": "no"}])
    rows = read([DataFile(path, "rows.jsonl")], columns={"prompt": "question", "completion": "answer"})
    assert rows.format.to_example(rows[0].data) == CompletionExample("a", "b")
    path = write(tmp_path / "rows.jsonl", [{"question": "a", "answer": 4}])
    with pytest.raises(DatasetInvalid, match=r"^rows\.jsonl:1: 'question' and 'answer' must both be strings"):
        load(path, columns={"prompt": "question", "completion": "answer"})
    with pytest.raises(DatasetInvalid, match=r"^rows\.jsonl:1: has no column 'reply'; it has 'question', 'answer'$"):
        load(path, columns={"prompt": "question", "completion": "reply"}, format="prompt-completion")
    with pytest.raises(ConfigInvalid, match=r"^spec\.dataset\.columns: 'tools' is no column of alpaca rows, but inst"):
        load(write(path, [{"instruction": "a", "output": "b"}]), columns={"tools": "x"})


@pytest.mark.parametrize(
    ("template", "example"),
    [
        ("### {instruction}\n", CompletionExample("### add\n", "3")),
        ("### {instruction}\n{input} -> {output}!", CompletionExample("### add\n1+2 -> ", "3!")),
        ("{{ {input} }}", CompletionExample("{ 1+2 }", "3")),
    ],
)
def test_a_template_writes_rows_of_any_columns(template: str, example: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"instruction": "add", "input": "1+2", "output": "3"}])
    rows = read([DataFile(path, "rows.jsonl")], template=template)
    assert (rows.format.name, rows.format.to_example(rows[0].data)) == ("template", example)


def test_a_template_without_an_answer_is_learned_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"title": "{body}", "body": "x"}])
    rows = read([DataFile(path, "rows.jsonl")], template="{title}: {body}")
    assert rows.format.to_example(rows[0].data) == TextExample("{body}: x", "dataset.template")
    with pytest.raises(DatasetInvalid, match=r"^rows\.jsonl:1: 'title' must be a string, not int$"):
        load(write(path, [{"title": 1, "body": "x"}]), template="{title}: {body}")


def test_the_log_says_what_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "id": 1, "source": "x"}])
    with structlog.testing.capture_logs() as logs:
        load(path)
    assert "rows.jsonl: Nothing is learned of the columns id, source" in [entry["event"] for entry in logs]


@pytest.mark.parametrize(("shape", "data", "problem"), BAD_ROWS)
def test_a_bad_row_is_explained(shape: Any, data: Any, problem: str) -> None:
    row = formats.named(shape).checked(Row("f.jsonl", 4, data))
    assert problem in str(row)
    assert str(row).startswith("f.jsonl:4: ")


def test_columns_of_no_format_are_told_what_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"body": "x", "id": 1}])
    sentence = (
        r"^rows\.jsonl:1: columns are 'body', 'id'; needed are 'content', or 'instruction' and 'output', or 'prompt'"
        r" and 'completion', or 'conversations', or 'messages' \(dataset\.columns gives other names\)$"
    )
    with pytest.raises(DatasetInvalid, match=sentence):
        load(path, text_field="content")


def test_the_api_names_the_same_formats() -> None:
    in_api = get_args(Dataset.model_fields["format"].annotation)
    assert set(in_api) == {"auto"} | {each.name for each in formats.FORMATS}
    known = {column for each in formats.FORMATS for column in (*each().columns, *each().optional)}
    assert set(COLUMNS) == known - {"parallel_tool_calls"}, "nobody has another name for OpenAI's own column"


def test_the_documented_format_works_from_detection_to_labels(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.data.tokenizer import load_tokenizer

    [source] = blocks(ROOT / "docs" / "extending" / "data-format.md", "python")
    module: dict[str, Any] = {}
    exec(compile(source, "quiz.py", "exec"), module)
    monkeypatch.setattr(formats, "FORMATS", [module["QuizFormat"], *formats.FORMATS])

    row = {"question": "name a fruit", "answer": "apples"}
    rows = read([DataFile(write(tmp_path / "rows.jsonl", [row]), "rows.jsonl")])
    assert rows.format.name == "quiz"
    tokenizer = load_tokenizer(tiny_model, "file://model")
    encoded = encode(rows, rows.format, Encoder(tokenizer, 128), "training")
    learned = [token for token in encoded.labels[0] if token != -100]
    assert tokenizer.decode(learned) == " apples</s>"
    with pytest.raises(DatasetInvalid, match=r"^rows\.jsonl:1: 'answer' is empty$"):
        load(write(tmp_path / "rows.jsonl", [row | {"answer": " "}]))
