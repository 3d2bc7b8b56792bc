"""A trial that has diverged stays so in the attempts that are made for another trial's sake."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api.manifest import load_file
from finetune_api.spec import Metadata
from finetune_trainer.checkpoints.folder import RunDirectory
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.context import RunContext
from finetune_trainer.errors import Diverged
from finetune_trainer.reporting.metrics_log import MetricsLog
from finetune_trainer.settings import Environment, Ranks, Settings
from finetune_trainer.stores.errors import StoreUnavailable
from finetune_trainer.stores.folder import FolderStore
from support.trainer.process import job


def attempt(folder: Path, uid: str | None = "1111", name: str = "nli-a") -> Any:
    """What one attempt of a trial works with; its scratch folder is new."""
    manifest = load_file(job(folder / "job", folder / "model", {"output.uri": f"file://{folder}/out"}))
    named = manifest.model_copy(update={"metadata": Metadata(name=name, namespace="team", uid=uid)})
    settings = Settings(named, Environment.from_env(os.environ), Ranks())
    directory = RunDirectory(folder / f"scratch-{len(list(folder.iterdir()))}")
    metrics = MetricsLog(directory.metrics_file, lambda step, values: None)
    context = object.__new__(RunContext)
    for key, value in {"metrics": metrics, "directory": directory}.items():
        object.__setattr__(context, key, value)
    return SimpleNamespace(
        checkpoints=CheckpointManager(settings), directory=directory, metrics=metrics, context=context
    )


def diverges(found: Any, fingerprint: str = "f") -> None:
    with (
        pytest.raises(Diverged, match=r"infinite at step 7$"),
        found.checkpoints.remembering(fingerprint, found.directory),
    ):
        found.metrics.log(2, {"evalLoss": 0.5})
        found.metrics.log(4, {"evalLoss": 0.25, "loss": 1.0})
        raise Diverged("The loss became infinite at step 7")


def test_the_next_attempt_knows_and_those_beside_it_learn_what_it_had_measured(tmp_path: Path) -> None:
    assert attempt(tmp_path).checkpoints.diverged("f") is None
    diverges(attempt(tmp_path))
    again = attempt(tmp_path)
    with pytest.raises(Diverged, match=r"infinite at step 7 \(so an earlier attempt found"):
        again.context.stays_diverged(again.checkpoints.diverged("f"))
    assert again.directory.eval_losses() == {2: 0.5, 4: 0.25}
    with pytest.raises(Diverged, match="step 7"):
        attempt(tmp_path).context.stays_diverged(attempt(tmp_path).checkpoints.diverged("f"))


@pytest.mark.parametrize(
    ("uid", "name", "fingerprint"),
    [("2222", "nli-a", "f"), ("1111", "nli-a", "another spec or data"), ("1111", "nli-b", "f"), (None, "nli-a", "f")],
)
def test_no_other_run_is_held_back_by_it(tmp_path: Path, uid: str | None, name: str, fingerprint: str) -> None:
    diverges(attempt(tmp_path))
    found = attempt(tmp_path, uid, name)
    assert found.checkpoints.diverged(fingerprint) is None
    found.context.stays_diverged(None)


def test_one_without_identity_which_is_to_be_trained_anew_leaves_nothing(tmp_path: Path) -> None:
    diverges(attempt(tmp_path, uid=None))
    assert not (tmp_path / "out").exists() and attempt(tmp_path, uid=None).checkpoints.diverged("f") is None


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), None], ids=repr)
def test_other_ends_may_be_better_next_time(tmp_path: Path, error: BaseException | None) -> None:
    found = attempt(tmp_path)
    try:
        with found.checkpoints.remembering("f", found.directory):
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    assert attempt(tmp_path).checkpoints.diverged("f") is None


def test_a_store_that_does_not_take_it_hides_no_divergence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise StoreUnavailable("the disk is full")

    monkeypatch.setattr(FolderStore, "write_bytes", full)
    diverges(attempt(tmp_path))


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff", b'{"fingerprint": "f", "uid": "1111", "message": ""}'])
def test_a_note_that_cannot_be_read_costs_no_more_than_training_again(tmp_path: Path, damage: bytes) -> None:
    diverges(attempt(tmp_path))
    [file] = (tmp_path / "out/checkpoints/diverged").iterdir()
    file.write_bytes(damage)
    assert attempt(tmp_path).checkpoints.diverged("f") is None
