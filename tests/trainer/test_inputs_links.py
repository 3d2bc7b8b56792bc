"""A link on a claim never leads a job to what lies outside of it: not its Secrets, not any other file."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api import constants
from finetune_trainer import inputs
from finetune_trainer.data.row_files import read_rows
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.settings import Environment, Ranks, Settings, load
from finetune_trainer.stores.errors import LeadsOutside
from support.trainer.process import job

SECRET = '{"text": "CANARY"}'


@pytest.fixture
def claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A claim with a model, an adapter and rows; beside it a Secret of the job."""
    claim = tmp_path / "claims" / "data"
    for path, text in {
        "model/config.json": "{}",
        "model/tokenizer.json": "{}",
        "model/model.safetensors": "weights",
        "adapter/adapter_config.json": "{}",
        "adapter/adapter_model.safetensors": "weights",
        "rows/a.jsonl": '{"text": "a row"}',
    }.items():
        (claim / path).parent.mkdir(parents=True, exist_ok=True)
        (claim / path).write_text(text)
    secret = tmp_path / "secrets" / "dataset"
    secret.mkdir(parents=True)
    (secret / "password").write_text(SECRET)
    (secret / "extra.jinja").write_text(SECRET)
    (secret / "rows.jsonl").write_text(SECRET)
    monkeypatch.setenv(constants.ENV_PVC_ROOT, str(claim.parent))
    monkeypatch.setenv(constants.ENV_SECRETS_DIR, str(tmp_path / "secrets"))
    return claim


def _settings(claim: Path, scheme: str = "pvc") -> Settings:
    base = f"file://{claim}" if scheme == "file" else "pvc://data"
    changes = {"model.source": f"{base}/model", "lora.initFrom": f"{base}/adapter", "dataset.train": f"{base}/rows"}
    config = job(claim.parents[1] / "job", claim / "model", changes)
    place = {"FINETUNE_SCRATCH_DIR": str(claim.parents[1] / "scratch"), **os.environ}
    return load(config, [], Environment.from_env(place), Ranks())


def _read(settings: Settings, work: Path) -> str:
    """All that a run reads of its inputs, as one text."""
    folders = [
        inputs.fetch_model_metadata(settings, work).folder,
        inputs.fetch_model_weights(settings, work, None),
        inputs.fetch_adapter(settings, work),
    ]
    texts = [path.read_text() for folder in folders if folder for path in folder.rglob("*") if path.is_file()]
    train, _ = inputs.fetch_data_files(settings)
    return "".join([*texts, *(str(row.data) for row in read_rows(train, [], settings.spec.dataset).train)])


def _link(path: str, target: str) -> Callable[[Path, Path], None]:
    """Lay a link at `path` of the claim to `target` of the Secret."""

    def plant(claim: Path, secret: Path) -> None:
        (claim / path).parent.mkdir(parents=True, exist_ok=True)
        (claim / path).unlink(missing_ok=True)
        (claim / path).symlink_to(secret / target)

    return plant


def _chain(claim: Path, secret: Path) -> None:
    (claim / "hop").symlink_to(os.path.relpath(secret, claim))
    (claim / "model" / "vocab.json").symlink_to("../hop/password")


def _whole_folder(claim: Path, secret: Path) -> None:
    (claim / "rows").rename(claim / "old")
    (claim / "rows").symlink_to(secret)


ATTACKS = {
    "template": _link("model/chat_template.jinja", "password"),
    "configuration": _link("model/config.json", "password"),
    "more templates": _link("model/additional_chat_templates/x.jinja", "extra.jinja"),
    "a folder": _link("model/additional_chat_templates", "."),
    "code": _link("model/modeling.py", "password"),
    "weights": _link("model/model-2.safetensors", "password"),
    "two links": _chain,
    "an adapter": _link("adapter/adapter_config.json", "password"),
    "an adapter's weights": _link("adapter/adapter_model.safetensors", "password"),
    "rows": _link("rows/b.jsonl", "password"),
    "a folder of rows": _link("rows/more", "."),
    "the folder itself": _whole_folder,
}


@pytest.mark.parametrize("scheme", ["pvc", "file"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_a_link_out_of_the_claim_is_refused_by_name(attack: str, scheme: str, claim: Path, tmp_path: Path) -> None:
    ATTACKS[attack](claim, tmp_path / "secrets" / "dataset")
    sentence = (
        r"^spec\.(model\.source|lora\.initFrom|dataset\.train): .*(leads out of \S+|private), through a symbolic link: "
    )
    with pytest.raises(LeadsOutside, match=sentence) as caught:
        _read(_settings(claim, scheme), tmp_path / "work")
    assert "CANARY" not in str(caught.value)


def test_a_single_file_that_is_a_link_is_refused(claim: Path, tmp_path: Path) -> None:
    _link("rows/b.jsonl", "password")(claim, tmp_path / "secrets" / "dataset")
    for uri in ("pvc://data/rows/b.jsonl", f"file://{claim}/rows/b.jsonl"):
        config = job(tmp_path / "job", claim / "model", {"dataset.train": uri})
        with pytest.raises(LeadsOutside, match=r"spec\.dataset\.train: .*b\.jsonl leads "):
            inputs.fetch_data_files(load(config, [], Environment.from_env(), Ranks()))


def test_a_link_that_is_laid_after_the_check_is_not_followed(claim: Path, tmp_path: Path) -> None:
    """Rows are opened anew on every pass; a model's files are copied, so that libraries read what was checked."""
    settings = _settings(claim)
    (files, _) = inputs.fetch_data_files(settings)
    model = inputs.fetch_model_metadata(settings, tmp_path / "work").folder
    (claim / "rows" / "a.jsonl").unlink()
    (claim / "rows" / "a.jsonl").symlink_to(tmp_path / "secrets" / "dataset" / "password")
    (claim / "model" / "tokenizer.json").unlink()
    (claim / "model" / "tokenizer.json").symlink_to(tmp_path / "secrets" / "dataset" / "password")
    with pytest.raises(LeadsOutside, match=r"a\.jsonl leads out of"):
        list(files[0].raw_rows())
    assert (model / "tokenizer.json").read_text() == "{}" and not (model / "tokenizer.json").is_symlink()


def test_a_pipe_or_a_device_is_no_file(claim: Path, tmp_path: Path) -> None:
    os.mkfifo(claim / "rows" / "b.jsonl")
    settings = _settings(claim)
    assert "a row" in _read(settings, tmp_path / "work")
    config = job(tmp_path / "job", claim / "model", {"dataset.train": "pvc://data/rows/b.jsonl"})
    with pytest.raises(Exception, match=r"b\.jsonl"):
        inputs.fetch_data_files(load(config, [], Environment.from_env(), Ranks()))


@pytest.mark.parametrize("scheme", ["pvc", "file"])
def test_links_that_stay_below_the_claim_work(scheme: str, claim: Path, tmp_path: Path) -> None:
    """Kubernetes' projected volumes, a hub's cache on a claim, and a loop."""
    version = claim / "rows" / "..2026_11_28"
    version.mkdir()
    (claim / "rows" / "a.jsonl").rename(version / "a.jsonl")
    (claim / "rows" / "..data").symlink_to(version.name)
    (claim / "rows" / "a.jsonl").symlink_to("..data/a.jsonl")
    repository = claim / "models--org--base"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for index, path in enumerate(sorted((claim / "model").iterdir())):
        path.rename(repository / "blobs" / str(index))
        (snapshot / path.name).symlink_to(f"../../blobs/{index}")
    (claim / "model").rmdir()
    (claim / "model").symlink_to(snapshot.relative_to(claim))
    (claim / "adapter" / "loop").symlink_to(".")
    read = _read(_settings(claim, scheme), tmp_path / "work") if scheme == "pvc" else ""
    if scheme == "file":
        config = job(tmp_path / "job", snapshot, {"dataset.train": f"file://{claim}/rows"})
        settings = load(config, [], Environment.from_env(), Ranks())
        read = _read(settings, tmp_path / "work")
    assert "weights" in read and read.count("a row") == 1


@pytest.mark.parametrize(
    "name",
    ["../../secrets/dataset/password", "/etc/passwd", "gone.safetensors", 5, None, "config.json", "x" * 9999, "\ud800"],
)
def test_an_index_of_weights_names_files_of_the_model_only(name: Any, claim: Path, tmp_path: Path) -> None:
    index = claim / "model" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(
        ConfigInvalid, match=r"spec\.model\.source: .*index\.json names .*, which is no safetensors file of the model"
    ):
        inputs.fetch_model_weights(_settings(claim), tmp_path / "work", None)


@pytest.mark.parametrize("weights", ["adapter_model.bin", "adapter_model.pt"])
def test_an_adapter_to_begin_with_is_read_as_safetensors_only(weights: str, claim: Path, tmp_path: Path) -> None:
    (claim / "adapter" / "adapter_model.safetensors").rename(claim / "adapter" / weights)
    sentence = r"spec\.lora\.initFrom: pvc://data/adapter has no adapter_model\.safetensors; other formats can run code"
    with pytest.raises(ConfigInvalid, match=sentence):
        inputs.fetch_adapter(_settings(claim), tmp_path / "work")
    (claim / "adapter" / "adapter_model.safetensors").write_text("weights")
    folder = inputs.fetch_adapter(_settings(claim), tmp_path / "work")
    assert folder is not None
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
