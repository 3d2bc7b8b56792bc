"""A checkpoint belongs to whatever would compute the same; anything new in the spec counts until it is named."""

from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.checkpoints.fingerprint import EXECUTION_ONLY_FIELDS, fingerprint
from finetune_trainer.data.dataset import TokenizedDataset

SPEC: dict[str, Any] = {
    "model": {"source": "hf://org/base"},
    "dataset": {"train": "s3://data/train.jsonl", "eval": "s3://data/eval.jsonl"},
    "output": {"uri": "s3://adapters/a"},
}


def _fingerprint(changes: dict[str, Any] | None = None, commit: str = "c0ffee", last_label: int = 3) -> str:
    rows = TokenizedDataset()
    rows.input_ids.append([1, 2, 3])
    rows.labels.append([-100, 2, last_label])
    merged = {key: SPEC.get(key, {}) | value for key, value in (changes or {}).items()}
    return fingerprint(FineTuneJobSpec.model_validate(SPEC | merged), commit, [rows])


def test_it_is_that_of_the_first_release_whose_checkpoints_still_resume() -> None:
    assert _fingerprint() == "2320bec12949abed44ce2b332fe32cfca5a668a7b3bcd975cc30495a776bc1c8"


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"microBatchSize": 2, "gradientCheckpointing": "enabled", "packing": "disabled"}},
        {"model": {"attention": "eager", "secretRef": {"name": "token"}}},
        {"output": {"overwrite": True}, "checkpoint": {"everySteps": 7}, "recovery": {"maxAttempts": 9}},
        {"resources": {"memory": "64Gi"}, "logging": {"everySteps": 3}},
    ],
)
def test_how_to_run_does_not_count(changes: dict[str, Any]) -> None:
    assert _fingerprint(changes) == _fingerprint()


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"seed": 7}},
        {"lora": {"rank": 8}},
        {"quantization": {"bits": 16}},
        {"evaluation": {"everySteps": 9}},
        {"model": {"revision": "main"}},
    ],
)
def test_what_decides_the_result_counts(changes: dict[str, Any]) -> None:
    assert _fingerprint(changes) != _fingerprint()


def test_the_base_commit_and_the_rows_count() -> None:
    assert len({_fingerprint(), _fingerprint(commit="other"), _fingerprint(last_label=4)}) == 3


@pytest.mark.parametrize("path", ["tomorrow", "training.tomorrow"])
def test_a_field_of_a_later_version_counts_by_itself(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, manifest = _fingerprint(), FineTuneJobSpec.manifest
    section, _, name = path.rpartition(".")

    def with_new_field(self: FineTuneJobSpec) -> dict[str, Any]:
        found = manifest(self)
        (found[section] if section else found)[name] = "x"
        return found

    monkeypatch.setattr(FineTuneJobSpec, "manifest", with_new_field)
    assert _fingerprint() != before


def test_every_field_that_does_not_count_exists() -> None:
    schema = FineTuneJobSpec.model_json_schema(by_alias=True)
    for path in EXECUTION_ONLY_FIELDS:
        section, *names = path.split(".")
        field = schema["properties"][section]
        for name in names:
            reference = field.get("$ref") or field["allOf"][0]["$ref"]
            field = schema["$defs"][reference.rpartition("/")[2]]["properties"].get(name)
            assert field, path


#: A value of each field of dataset that is not its default, and what must be beside it.
DATASET_FIELDS: dict[str, dict[str, Any]] = {
    "train": {"train": "s3://data/other.jsonl"},
    "sources": {"train": None, "sources": [{"uri": "s3://data/train.jsonl"}]},
    "eval": {"eval": "s3://data/other.jsonl"},
    "evalFraction": {"eval": None, "evalFraction": 0.1},
    "format": {"format": "messages"},
    "textField": {"textField": "body"},
    "columns": {"columns": {"text": "body"}},
    "template": {"template": "{question}"},
    "loss": {"loss": "all"},
    "addTokens": {"addTokens": ["<a>"]},
    "secretRef": {"secretRef": {"name": "store"}},
}
#: Why a field of dataset does not count.
DATASET_FIELDS_LEFT_OUT = {
    "loss": "the labels that follow from it count",
    "secretRef": "it says how to reach the rows, and the rows count",
}


def test_every_field_of_the_data_set_counts_or_is_left_out_for_a_reason() -> None:
    schema = FineTuneJobSpec.model_json_schema(by_alias=True)
    assert set(DATASET_FIELDS) == set(schema["$defs"]["Dataset"]["properties"]), "say of a new field whether it counts"
    left_out = {path.partition(".")[2] for path in EXECUTION_ONLY_FIELDS if path.startswith("dataset.")}
    assert left_out == set(DATASET_FIELDS_LEFT_OUT)
    lora = {"embeddings": True}
    for name, value in DATASET_FIELDS.items():
        same = _fingerprint({"dataset": value, "lora": lora}) == _fingerprint({"lora": lora})
        assert same == (name in DATASET_FIELDS_LEFT_OUT), name


def test_a_later_field_counts_once_it_is_set() -> None:
    assert _fingerprint({"lora": {"embeddings": False}}) == _fingerprint()
    assert _fingerprint({"lora": {"embeddings": True}}) != _fingerprint()
