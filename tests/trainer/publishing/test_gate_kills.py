"""An attempt that is killed at any request between the end of training and the manifest decides once, loses nothing.

The adapter to beat becomes another while no attempt runs, so that whoever decided anew would decide otherwise.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api import constants
from finetune_api.artifact_manifest import Lineage
from finetune_api.latest import LATEST_FILE, Latest, Promotion
from finetune_api.manifest import load_file
from finetune_api.spec import Metadata
from finetune_api.uri import parse
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.publishing import gate
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.reporting.report import Reporter
from finetune_trainer.settings import Environment, Ranks, Settings
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.folder import FolderStore
from finetune_trainer.stores.open import open_store
from support.trainer.process import job

MINE = Lineage(eval_rows=f"sha256:{'a' * 64}")
ELSE = Lineage(eval_rows=f"sha256:{'b' * 64}")
REQUESTS = ("exists", "list", "read_bytes", "digest", "write_bytes", "upload", "delete")


class Killed(BaseException):
    """SIGKILL: nothing of the attempt runs any more."""


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, number: int | None) -> Iterator[None]:
    """Kill the process at its request `number` to any store, before it is served."""
    left = [number]

    def wrapped(request: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if left[0] is not None:
                if not left[0]:
                    raise Killed
                left[0] -= 1
            return request(*arguments, **more)

        return call

    with monkeypatch.context() as patch:
        for name in REQUESTS:
            patch.setattr(FolderStore, name, wrapped(getattr(FolderStore, name)))
        yield


def adapter(folder: Path, weights: bytes, lineage: Lineage, loss: float) -> Bundle:
    folder.mkdir(parents=True)
    (folder / constants.ADAPTER_CONFIG_FILE).write_text("{}")
    (folder / constants.ADAPTER_WEIGHTS_FILE).write_bytes(weights)
    return Bundle(folder, ARTIFACTS["Adapter"], "org/base", 8, {"evalLoss": loss}, lineage=lineage)


class Place:
    """A bucket with the adapter that is to be replaced, three to beat, and a pointer to one of these."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mine = adapter(folder / "mine", b"mine" * 9, MINE, 0.4)
        self.digests = {}
        for name, lineage, loss in (("poor", MINE, 0.5), ("good", MINE, 0.3), ("strange", ELSE, 0.5)):
            self.digests[name] = self._put(f"best/{name}", name.encode(), lineage, loss)
        self._put("out", b"old" * 9, ELSE, 9.0)
        self.old = self.published("out")
        changes = {
            "publish.onlyIf": [{"metric": "evalLoss", "betterThan": f"file://{folder}/best"}],
            "output.uri": f"file://{folder}/out",
            "output.overwrite": True,
        }
        manifest = load_file(job(folder / "job", folder / "model", changes))
        named = manifest.model_copy(update={"metadata": Metadata(name="nli", namespace="team", uid="1111")})
        self.settings = Settings(named, Environment.from_env(os.environ), Ranks())

    def _put(self, path: str, weights: bytes, lineage: Lineage, loss: float) -> str:
        made = adapter(self.folder / "made" / path, weights, lineage, loss)
        store = open_store(parse(f"file://{self.folder}/{path}"), Credentials("output", {}))
        return AdapterOutput(store, Metadata(name="other", uid="2222")).publish(made).manifest_digest

    def point(self, name: str) -> None:
        pointer = self.folder / "best" / LATEST_FILE
        pointer.unlink(missing_ok=True)
        if name in self.digests:
            at = "2026-01-01T00:00:00Z"
            entry = Promotion.model_validate(
                {"path": name, "manifestDigest": self.digests[name], "promotedAt": at}, by_alias=True
            )
            pointer.write_bytes(Latest(current=entry).to_bytes())

    def published(self, path: str) -> bytes | None:
        """The weights that readers see at `path`; None where there is no manifest. Raises if any of it differs."""
        store = open_store(parse(f"file://{self.folder}/{path}"), Credentials("output", {}))
        if (found := store_manifest.read(store)) is None:
            return None
        store_manifest.verify(store, found[0])
        return store.read_bytes(constants.ADAPTER_WEIGHTS_FILE)

    def attempt(self) -> bool:
        """What run.run does around the training; return whether the adapter is published."""
        ctx: Any = SimpleNamespace(settings=self.settings, spec=self.settings.spec, report=Reporter())
        output, checkpoints = AdapterOutput.open(self.settings), CheckpointManager(self.settings)
        candidate = gate.candidate_output(self.settings)
        for place in (output, candidate):
            if place.find_published():
                checkpoints.finish()
                return place is output
        gate.check_gate(self.settings, MINE, checkpoints.decided("f"))
        output, bundle, refusal = gate.through_gate(ctx, output, self.mine, checkpoints, "f")
        output.publish(bundle)
        checkpoints.finish()
        return not refusal


@pytest.mark.parametrize(
    ("before", "after"),
    [("poor", "good"), ("good", "poor"), pytest.param("poor", "strange", marks=pytest.mark.nightly)],
)
def test_what_is_decided_stays_whatever_becomes_of_the_adapter_to_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    kills, place = 0, Place(tmp_path)
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    for number in range(1000):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        place.point(before)
        try:
            with killed_at(monkeypatch, number):
                place.attempt()
                break
        except Killed:
            kills += 1
        if CheckpointManager(place.settings).decided("f") is None:
            shown = place.published("out"), gate.candidate_output(place.settings).find_published() is not None
            assert shown in (
                (place.old, False),  # nothing is decided yet
                (b"mine" * 9, False) if before == "poor" else (place.old, True),  # all is done
            ), f"kill {number}: something was changed before the decision was kept"
            if shown == (place.old, False):
                continue
        place.point(after)
        with monkeypatch.context() as patch:
            patch.setattr(gate, "judge", lambda *_: pytest.fail("decided again"))
            published = place.attempt()
        assert published == (before == "poor"), f"kill {number}"
        assert place.published("out") == (b"mine" * 9 if published else place.old), f"kill {number}"
        candidate = gate.candidate_output(place.settings)
        assert (candidate.find_published() is None) == published
        assert not list((place.folder / "out").rglob("gate")), "nothing of the decision is left"
    assert kills > 20


def test_a_decision_of_another_run_or_of_other_weights_is_none(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.point("poor")
    checkpoints = CheckpointManager(place.settings)
    checks = gate.judge(place.settings, {"evalLoss": 0.4}, MINE)
    checkpoints.keep_decision("f", checks)
    assert checkpoints.decided("f") == checks
    assert checkpoints.decided("g") is None
    anew = place.settings.job.model_copy(update={"metadata": Metadata(name="nli", namespace="team", uid="11112222")})
    (kept,) = (place.folder / "out/checkpoints/gate").iterdir()
    other = CheckpointManager(Settings(anew, place.settings.environment, Ranks()))
    kept.rename(kept.with_name("nli-11112222.json"))
    assert other.decided("f") is None
    checkpoints.keep_decision("f", [checks[0].model_copy(update={"value": 0.39})])
    place.point("good")
    assert not place.attempt(), "trained again from an older checkpoint, it has another loss: that is judged"
    kept.write_text("{" * 99)
    assert checkpoints.decided("f") is None


@pytest.mark.parametrize(
    "forged",
    [
        {"metric": "f1", "value": None, "comparison": "atLeast", "other": None, "bar": 0.0},
        {"comparison": "atMost", "other": None, "bar": 9.0},
        {"other": "s3://bucket/easier", "bar": 9.0},
        {"bar": 0.3},
        {"bar": None},
        {"value": 0.1, "bar": 0.3},
    ],
)
def test_a_decision_that_does_not_follow_from_spec_and_metrics_is_none(tmp_path: Path, forged: dict[str, Any]) -> None:
    """Damaged, or by somebody who knows the fingerprint: what passes is computed again."""
    place = Place(tmp_path)
    place.point("good")
    (check,) = gate.judge(place.settings, {"evalLoss": 0.4}, MINE)
    assert not check.passed
    for checks in ([check.model_copy(update={"passed": True, **forged})], [check, check]):
        CheckpointManager(place.settings).keep_decision("f", checks)
        assert not place.attempt()
        assert place.published("out") == place.old
        shutil.rmtree(tmp_path / "out/candidates")


def test_a_number_to_reach_is_compared_again(tmp_path: Path) -> None:
    place = Place(tmp_path)
    asked = place.settings.spec.model_validate(
        place.settings.spec.manifest() | {"publish": {"onlyIf": [{"metric": "evalLoss", "atMost": 0.3}]}}
    )
    place.settings = replace(place.settings, job=place.settings.job.model_copy(update={"spec": asked}))
    (check,) = gate.judge(place.settings, {"evalLoss": 0.4}, MINE)
    for change in ({"passed": True}, {"passed": True, "bar": 0.5}):
        CheckpointManager(place.settings).keep_decision("f", [check.model_copy(update=change)])
        assert not place.attempt()
        shutil.rmtree(tmp_path / "out/candidates")


def test_who_writes_checkpoints_elsewhere_decides_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.point("good")
    elsewhere = f"file://{tmp_path}/elsewhere"
    spec = place.settings.spec
    moved = spec.model_copy(update={"checkpoint": spec.checkpoint.model_copy(update={"uri": elsewhere})})
    checkpoints = CheckpointManager(replace(place.settings, job=place.settings.job.model_copy(update={"spec": moved})))
    checkpoints.keep_decision("f", gate.judge(place.settings, {"evalLoss": 0.4}, MINE))
    assert (tmp_path / "out/checkpoints/gate").is_dir()
    assert not (tmp_path / "elsewhere").exists()
    checkpoints.finish()
    assert not list((tmp_path / "out").rglob("gate/*"))
