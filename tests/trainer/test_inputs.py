"""Of a data set on the hub only the wanted split is read: test rows are never trained on."""

import gzip
import threading
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.data.row_files import read_rows
from finetune_trainer.errors import DatasetInvalid
from finetune_trainer.inputs import fetch_data_files, fetch_model_metadata
from finetune_trainer.runtime import read_ahead
from finetune_trainer.settings import Environment, Ranks, load
from support.stores.hub import Hub
from support.trainer.process import job

URI = "hf://datasets/org/rows"


@pytest.fixture
def data_set(hub: Hub, tmp_path: Path) -> Path:
    """What people upload: shards of three splits, and what tools leave beside them."""
    folder = tmp_path / "repository"
    for path in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl",
                 "validation.jsonl", "dataset_infos.json", "README.md", ".gitattributes", ".cache/train.json",
                 "extra/part.jsonl"):  # fmt: skip
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text('{"text": "a row"}\n')
    hub.add("datasets/org/rows", folder)
    return folder


def _shards(hub: Hub, folder: Path, source: str, field: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    place: dict[str, Any] = {"FINETUNE_SCRATCH_DIR": str(folder), "FINETUNE_SECRETS_DIR": str(folder / "secrets")}
    manifest = job(folder, folder / "no-model", {f"dataset.{field}": source})
    train, held_out = fetch_data_files(load(manifest, [], Environment.from_env(place), Ranks()))
    return [file.name for file in (train if field == "train" else held_out)]


@pytest.mark.parametrize(
    ("source", "field", "expected"),
    [
        (URI, "train", ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"]),
        (URI, "eval", ["validation.jsonl"]),
        (f"{URI}/data", "train", ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
        (f"{URI}/test", "eval", ["data/test-00000-of-00001.jsonl"]),
        (f"{URI}/data/train", "train", ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"]),
        (f"{URI}/extra", "train", ["part.jsonl"]),
        (f"{URI}/data/test-00000-of-00001.jsonl", "train", ["test-00000-of-00001.jsonl"]),
    ],
)
def test_only_the_split_is_read_from_the_hub(
    source: str, field: str, expected: list[str], hub: Hub, data_set: Path, tmp_path: Path, monkeypatch
) -> None:
    assert _shards(hub, tmp_path, source, field, monkeypatch) == expected


def test_a_split_that_is_not_there_names_the_field_and_the_splits(
    hub: Hub, data_set: Path, tmp_path: Path, monkeypatch
) -> None:
    sentence = rf"^spec\.dataset\.train: {URI} has neither a path nor a split 'trian'; its splits are: test, train, val"
    with pytest.raises(DatasetInvalid, match=sentence):
        _shards(hub, tmp_path, f"{URI}/trian", "train", monkeypatch)
    with pytest.raises(DatasetInvalid, match=r"org/rows has no 'no-such\.jsonl' at main"):
        _shards(hub, tmp_path, f"{URI}/no-such.jsonl", "train", monkeypatch)


_README = """---
configs:
- config_name: 20220301.en
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: [extra/*.jsonl]}
- {config_name: whole, data_files: "extra/*"}
- {config_name: gone, data_files: "nowhere/*"}
---
# Rows
"""


def test_a_subset_of_the_hub_is_what_its_readme_declares(
    hub: Hub, data_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_set / "README.md").write_text(_README)
    hub.add("datasets/org/rows", data_set)
    assert _shards(hub, tmp_path, f"{URI}/20220301.en", "train", monkeypatch) == [
        "data/train-00000-of-00002.jsonl",
        "data/train-00001-of-00002.jsonl",
    ]
    assert _shards(hub, tmp_path, f"{URI}/20220301.en", "eval", monkeypatch) == ["extra/part.jsonl"]
    assert _shards(hub, tmp_path, f"{URI}/whole", "train", monkeypatch) == ["extra/part.jsonl"]
    assert _shards(hub, tmp_path, f"{URI}/test", "train", monkeypatch) == ["data/test-00000-of-00001.jsonl"]
    with pytest.raises(DatasetInvalid, match="its subset whole has no validation or test split; it has train"):
        _shards(hub, tmp_path, f"{URI}/whole", "eval", monkeypatch)
    with pytest.raises(DatasetInvalid, match="names files of gone that are not there: nowhere/"):
        _shards(hub, tmp_path, f"{URI}/gone", "train", monkeypatch)


def test_a_folder_is_read_whole_compressed_files_too(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "one"}\n')
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}\n'))
    (folder / "notes.md").touch()
    manifest = job(tmp_path, tmp_path / "no-model", {"dataset.train": f"file://{folder}"})
    settings = load(manifest, [], Environment.from_env(), Ranks())
    files, _ = fetch_data_files(settings)
    assert [file.name for file in files] == ["a.jsonl", "b.jsonl.gz"]
    assert [row.data["text"] for row in read_rows(files, [], settings.spec.dataset).train] == ["one", "two"]
    (folder / "c.jsonl.bz2").touch()
    with pytest.raises(DatasetInvalid, match=r"c\.jsonl\.bz2 is compressed in a way that is not read: use \.gz"):
        fetch_data_files(settings)


def test_weights_that_are_here_are_known_before_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a claim or a folder they are read ahead: those that will be loaded, and nothing that a link leads out to."""
    model = tmp_path / "model"
    names = (
        "config.json",
        "model-2.safetensors",
        "model-1.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
    )
    for name in (*names, "original/model.safetensors"):
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("{}")
    manifest = job(tmp_path, model, {})
    settings = load(manifest, [], Environment.from_env({"FINETUNE_SCRATCH_DIR": str(tmp_path)}), Ranks())
    files = fetch_model_metadata(settings, tmp_path / "work")
    assert [path.name for path in files.weights] == ["model-1.safetensors", "model-2.safetensors"]
    assert not list(files.folder.glob("*.safetensors")), "they are fetched later, and checked"
    read: list[str] = []
    monkeypatch.setattr(read_ahead, "_read", lambda path, open_file: read.append(open_file(path).read().decode()))
    files.read_ahead()
    for each in threading.enumerate():
        if each.name == "read-ahead":
            each.join(10)
    assert read == ["{}", "{}"]
