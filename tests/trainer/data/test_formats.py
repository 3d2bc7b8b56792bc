"""Each format detects its rows, explains bad ones, and one more format is one file."""

from pathlib import Path
from typing import Any, get_args

import pytest

from finetune_api.spec_data import Dataset
from finetune_trainer.data import formats
from finetune_trainer.data.dataset import DataFile, encode
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.rows import Row
from finetune_trainer.errors import DatasetInvalid
from support.docs.markdown import ROOT, blocks
from support.trainer.data_files import load, read, write


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "a", "id": 1}, "text"),
        ({"prompt": "a", "completion": "b"}, "prompt-completion"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
         "prompt-completion"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
    ],
)  # fmt: skip
def test_the_shape_of_rows_is_detected(row: dict[str, Any], shape: str, tmp_path: Path) -> None:
    assert load(write(tmp_path / "rows.jsonl", [row]))[1] == shape


def test_another_text_column_can_be_named(tmp_path: Path) -> None:
    assert load(write(tmp_path / "rows.csv", [{"body": "x", "id": "1"}]), text_field="body")[1] == "text"


BAD_ROWS = [
    ("text", {"text": "  "}, "'text' is empty"),
    ("text", {"text": None}, "has no column 'text'"),
    ("text", ["x"], "is not a JSON object"),
    ("prompt-completion", {"prompt": "a"}, "has no column 'completion'"),
    ("prompt-completion", {"prompt": "a", "completion": []}, "must both be strings, or both lists of messages"),
    ("messages", {"messages": "hi"}, "must be a list of messages"),
    ("messages", {"messages": [{"role": "robot", "content": "x"}]}, "'messages[0]'.role is 'robot'; it must be one of"),
    ("messages", {"messages": [{"role": "user", "content": 3}]}, "'messages[0]'.content must be a string"),
]


@pytest.mark.parametrize(("shape", "data", "problem"), BAD_ROWS)
def test_a_bad_row_is_explained(shape: Any, data: Any, problem: str) -> None:
    row = formats.named(shape).checked(Row("f.jsonl", 4, data))
    assert problem in str(row)
    assert str(row).startswith("f.jsonl:4: ")


def test_columns_of_no_format_are_told_what_is_needed(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"body": "x", "id": 1}])
    sentence = (
        r"^rows\.jsonl:1: columns are 'body', 'id'; needed are 'content', or 'prompt' and 'completion', or 'messages'"
        r" \(dataset\.textField names another text column\)$"
    )
    with pytest.raises(DatasetInvalid, match=sentence):
        load(path, text_field="content")


def test_the_api_names_the_same_formats() -> None:
    in_api = get_args(Dataset.model_fields["format"].annotation)
    assert set(in_api) == {"auto"} | {each.name for each in formats.FORMATS}


def test_the_documented_format_works_from_detection_to_labels(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune_trainer.data.tokenizer import load_tokenizer

    [source] = blocks(ROOT / "docs" / "extending" / "data-format.md", "python")
    module: dict[str, Any] = {}
    exec(compile(source, "alpaca.py", "exec"), module)
    monkeypatch.setattr(formats, "FORMATS", [module["AlpacaFormat"], *formats.FORMATS])

    row = {"instruction": "name a fruit", "output": "apples"}
    rows = read([DataFile(write(tmp_path / "rows.jsonl", [row]), "rows.jsonl")])
    assert rows.format.name == "alpaca"
    tokenizer = load_tokenizer(tiny_model, "file://model")
    encoded = encode(rows, rows.format, Encoder(tokenizer, 128), "training")
    learned = [token for token in encoded.labels[0] if token != -100]
    assert tokenizer.decode(learned) == "apples</s>"
    with pytest.raises(DatasetInvalid, match=r"^rows\.jsonl:1: 'output' is empty$"):
        load(write(tmp_path / "rows.jsonl", [row | {"output": " "}]))
