"""A checkpoint that is whole and still cannot be used gives way to the one before, and the log says which and why."""

import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from structlog.testing import capture_logs

from finetune_api import constants
from finetune_api.spec import FineTuneJob
from finetune_api.uri import parse
from finetune_trainer.checkpoints import remote
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.checkpoints.parse import require_usable
from finetune_trainer.checkpoints.state import STATE_FILE, TrainingState
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.settings import Environment, Ranks, Settings
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.open import open_store


def _checkpoint(folder: Path, step: int) -> Path:
    (folder / "best").mkdir(parents=True)
    TrainingState(fingerprint="f", step=step, before={"loss": 1.0}, best_step=None).save(folder)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    for path in ("adapter_model.safetensors", "best/adapter_model.safetensors"):
        save_file({"lora_A": np.ones(4, "float32")}, folder / path)
    for path in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        with zipfile.ZipFile(folder / path, "w") as archive:
            archive.writestr("data.pkl", "x")
    return folder


def _written(path: str, data: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).write_bytes(data.encode() if isinstance(data, str) else data) and None


def _trainer(**changes: object) -> Callable[[Path], None]:
    return _written("trainer_state.json", json.dumps({"global_step": 6} | changes))


def _state(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        found = json.loads((folder / STATE_FILE).read_text()) | changes
        (folder / STATE_FILE).write_text(json.dumps(found))

    return damage


def _gone(path: str) -> Callable[[Path], None]:
    return lambda folder: (folder / path).unlink()


def _huge(folder: Path) -> None:
    with (folder / STATE_FILE).open("r+b") as file:
        file.truncate(65 << 20)


DAMAGE = {
    "state: empty": (_written(STATE_FILE, ""), "JSONDecodeError"),
    "state: half": (_written(STATE_FILE, '{"step": 6, "fing'), "JSONDecodeError"),
    "state: a list": (_written(STATE_FILE, "[]"), STATE_FILE),
    "state: no text": (_written(STATE_FILE, b"\xff\xfe\x00"), "UnicodeDecodeError"),
    "state: nested": (_written(STATE_FILE, "[" * 200_000), "RecursionError"),
    "state: types": (_state(tokens="many"), "tokens"),
    "state: dict types": (_state(before=[1]), "before"),
    "state: null": (_state(metrics=None), "metrics"),
    "state: another step": (_state(step=5), "is of step 5, not 6"),
    "state: huge": (_huge, "larger than 64 MiB"),
    "state: gone": (_gone(STATE_FILE), "FileNotFoundError"),
    "trainer: no step": (_written("trainer_state.json", "{}"), "of step 0, not 6"),
    "trainer: list": (_written("trainer_state.json", "[1]"), "TypeError"),
    "trainer: a newer key": (_trainer(new_in_v9=1), "unexpected keyword argument 'new_in_v9'"),
    "trainer: history": (_trainer(log_history="none"), "log_history is str, not list"),
    "trainer: number": (_trainer(total_flos="1e9"), "total_flos is str, not int"),
    "trainer: step": (_trainer(global_step="6"), "of step 6, not 6"),
    "trainer: callbacks": (_trainer(stateful_callbacks=[1]), "must inherit"),
    "trainer: another step": (_written("trainer_state.json", '{"global_step": 7}'), "of step 7, not 6"),
    "trainer: gone": (_gone("trainer_state.json"), "FileNotFoundError"),
    "metrics: half": (_written("metrics.jsonl", '{"step": 1}\n{"st'), "metrics.jsonl"),
    "metrics: no step": (_written("metrics.jsonl", '{"loss": 1}\n'), "KeyError"),
    "metrics: number": (_written("metrics.jsonl", "5\n"), "TypeError"),
    "weights: empty": (_written("adapter_model.safetensors", b""), "SafetensorError"),
    "weights: header": (_written("adapter_model.safetensors", b"\xff" * 64), "SafetensorError"),
    "weights: cut": (_written("adapter_model.safetensors", (64).to_bytes(8, "little") + b"{}"), "SafetensorError"),
    "weights: none": (_written("adapter_model.safetensors", (2).to_bytes(8, "little") + b"{}"), "no tensors"),
    "weights: a pickle": (_gone("adapter_model.safetensors"), "adapter_model.safetensors"),
    "best: broken": (_written("best/adapter_model.safetensors", b"\0" * 9), "adapter_model.safetensors"),
    "optimizer: cut": (_written("optimizer.pt", b"PK\x03\x04half"), "optimizer.pt cannot be used: BadZipFile"),
    "random state: a pickle": (_written("rng_state.pth", b"\x80\x04."), "rng_state.pth cannot be used: BadZipFile"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_parse_gives_way_to_the_one_before(kind: str, tmp_path: Path) -> None:
    damage, reason = DAMAGE[kind]
    store = open_store(parse(f"file://{tmp_path}/store"), Credentials("output", {}))
    for step in (3, 6):
        folder = _checkpoint(tmp_path / f"saved-{step}", step)
        if step == 6:
            damage(folder)
        remote.save(folder, store, step, keep=5)
    with capture_logs() as logs:
        found = remote.resume(store, lambda step: tmp_path / f"local-{step}", check=require_usable)
    assert found is not None and found.step == 3
    assert require_usable(tmp_path / "local-3", 3).fingerprint == "f"
    assert not (tmp_path / "local-6").exists()
    [line] = logs
    assert (line["event"], line["step"]) == ("A checkpoint is broken, trying the one before", 6)
    assert reason in line["error"] and "\n" not in line["error"]


def test_a_manifest_that_names_another_step_is_no_checkpoint(tmp_path: Path) -> None:
    store = open_store(parse(f"file://{tmp_path}/store"), Credentials("output", {}))
    remote.save(_checkpoint(tmp_path / "saved", 3), store, 3, keep=5)
    (tmp_path / "store" / "step-00000003").rename(tmp_path / "store" / "step-00000009")
    assert remote.resume(store, lambda step: tmp_path / f"local-{step}", check=require_usable) is None


OTHER_ADAPTERS = {
    "shape": ({"lora_A": np.ones(5, "float32")}, r"lora_A has shape \[5\], not \[4\]"),
    "order": ({"lora_A": np.ones((2, 2), "float32")}, r"lora_A has shape \[2, 2\], not \[4\]"),
    "name": ({"lora_X": np.ones(4, "float32")}, "no tensor lora_A"),
    "more": ({"lora_A": np.ones(4, "float32"), "z": np.ones(4, "float32")}, "z is no tensor of this run's adapter"),
}


@pytest.mark.parametrize("where", ["adapter_model.safetensors", "best/adapter_model.safetensors"])
@pytest.mark.parametrize("kind", OTHER_ADAPTERS)
def test_weights_that_do_not_fit_give_way_to_the_one_before(kind: str, where: str, tmp_path: Path) -> None:
    tensors, reason = OTHER_ADAPTERS[kind]
    state, folder, logs = _resumed(tmp_path, lambda folder: save_file(tensors, folder / where))
    assert (state.step, folder) == (3, tmp_path / "run/checkpoints/checkpoint-3")
    [line] = [line for line in logs if line["log_level"] == "warning"]
    assert (line["event"], line["step"]) == ("A checkpoint is broken, trying the one before", 6)
    assert re.search(reason, line["error"])


def test_another_runs_weights_are_refused_not_passed_over(tmp_path: Path) -> None:
    def another(folder: Path) -> None:
        save_file({"lora_A": np.ones(5, "float32")}, folder / "adapter_model.safetensors")
        _state(fingerprint="g")(folder)

    with pytest.raises(ConfigInvalid, match="holds checkpoints of a run with another model, data set or hyperparam"):
        _resumed(tmp_path, another)


def _resumed(tmp_path: Path, damage: Callable[[Path], None]) -> tuple[TrainingState, Path | None, list[Any]]:
    """What a run finds whose newest checkpoint of two is damaged."""
    spec = {"model": {"source": "hf://a/b"}, "dataset": {"train": "file:///x.jsonl"}}
    job = FineTuneJob.model_validate(
        {
            "apiVersion": constants.API_VERSION,
            "kind": constants.KIND,
            "metadata": {"name": "nli", "namespace": "team", "uid": "u"},
            "spec": spec | {"output": {"uri": f"file://{tmp_path}/out"}},
        }
    )
    manager = CheckpointManager(Settings(job, Environment.from_env({}), Ranks()))
    for step in (3, 6):
        folder = _checkpoint(tmp_path / f"saved-{step}", step)
        if step == 6:
            damage(folder)
        manager.upload(folder, step)
    with capture_logs() as logs:
        state, found = manager.find(RunDirectory(tmp_path / "run"), "f", None, {"lora_A": (4,)})
    return state, found, logs
