"""The registry of controllers, with a second kind in it: the example of docs/extending/operator-kind.md."""

import asyncio
import copy
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest

from finetune_api import constants
from finetune_operator.core.controllers import FINETUNE_JOB, REGISTRY, Registry
from finetune_operator.core.objects.kinds import Kind, ObjectKey
from finetune_operator.reconcile.event_recorder import EventRecorder
from finetune_operator.reconcile.reconciler import CREATES_MORE_SECONDS, OWNER_SECONDS, Reconciler
from finetune_operator.reconcile.work_queue import WorkQueue
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache
from finetune_operator.watch.kopf_settings import kopf_settings
from finetune_operator.watch.progress import ProgressPoller
from finetune_operator.watch.relist import Relister
from finetune_operator.watch.source import WatchEvent, take
from support.docs.markdown import blocks
from support.simulation.api import ImaginedApi

Object = dict[str, Any]
ROOT = Path(__file__).parents[3]
SPEC = {
    "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
    "dataset": {"train": "s3://data/train.jsonl"},
    "output": {"uri": "s3://adapters/nli"},
}
DONE = {"type": "Succeeded", "status": "True", "reason": "Succeeded", "lastTransitionTime": "2026-11-01T00:00:00Z"}
JOB, SCAN = ObjectKey("FineTuneJob", "team", "nli"), ObjectKey("FineTuneScan", "team", "nli")


@pytest.fixture(scope="module")
def scan() -> ModuleType:
    """The module that the page shows."""
    [source] = blocks(ROOT / "docs" / "extending" / "operator-kind.md", "python")
    module = ModuleType("scan_of_the_page")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(source, "operator-kind.md", "exec"), module.__dict__)
    return module


def named(kind: str, uid: str, name: str = "nli", **spec: Any) -> Object:
    metadata = {"name": name, "namespace": "team", "uid": uid, "resourceVersion": "1", "generation": 1}
    return {"kind": kind, "metadata": metadata, "spec": spec}


class Recorded:
    """An operator's parts over objects in memory; `reconciled` are the keys in the order of their reconciles."""

    def __init__(self, *controllers: Any) -> None:
        self.registry = Registry(*controllers)
        self.api, self.cache = ImaginedApi(registry=self.registry), Cache(self.registry)
        self.reconciled: list[ObjectKey] = []
        self.statuses: list[str] = []
        poller, now = ProgressPoller(1, 1, 1, lambda key: None), datetime(2026, 11, 1, tzinfo=UTC)
        on_status = lambda old, new: self.statuses.append(type(new).__name__)  # noqa: E731
        recorder = cast(EventRecorder, self)
        self.changed: list[tuple[ObjectKey, float]] = []
        self.reconciler = Reconciler(
            self.api,
            self.cache,
            poller,
            recorder,
            on_status,
            Settings(),
            lambda: now,
            on_change=lambda key, seconds: self.changed.append((key, seconds)),
        )
        self.queue = WorkQueue(self._reconcile, workers=2)

    def post(self, kind: Kind, *about: object) -> None:
        """Stands for the event recorder."""

    async def _reconcile(self, key: ObjectKey) -> Any:
        self.reconciled.append(key)
        return await self.reconciler(key)

    def show(self, kind: str, obj: Object, what: str = "ADDED") -> None:
        """A watch shows an object."""
        take(self.cache, WatchEvent(what, kind, copy.deepcopy(obj)), self.queue.add)

    def store(self, kind: str, obj: Object) -> None:
        """The object exists, and a watch shows it."""
        self.show(kind, self.api.put(kind, obj))

    async def settle(self) -> None:
        work = asyncio.create_task(self.queue.run())
        await asyncio.sleep(0.3)
        work.cancel()


def test_two_kinds_of_one_namespace_and_name_are_reconciled_each_by_its_own_plan(scan: ModuleType):
    operator = Recorded(FINETUNE_JOB, scan.CONTROLLER)
    operator.store("FineTuneJob", named("FineTuneJob", "j1", **SPEC))
    operator.store("FineTuneScan", named("FineTuneScan", "s1", template=SPEC, learningRates=[1e-4, 2e-4]))
    asyncio.run(operator.settle())
    assert set(operator.reconciled) == {JOB, SCAN}
    made = {path.rpartition("/v1alpha1/")[2] or path for path in operator.api.objects}
    assert {f"namespaces/team/finetunejobs/{name}" for name in ("nli", "nli-t0", "nli-t1")} <= made
    assert operator.api.objects["/apis/batch/v1/namespaces/team/jobs/nli-1"]["metadata"]["uid"]
    status = {kind: operator.api.objects[f"/apis/finetune.dev/v1alpha1/namespaces/team/{kind}/nli"]["status"]
              for kind in ("finetunejobs", "finetunescans")}  # fmt: skip
    assert status["finetunescans"] == {"succeeded": 0}
    assert status["finetunejobs"]["phase"] == "Pending"
    assert sorted(operator.statuses) == ["JobObject", "Scan"]


def test_a_child_is_queued_under_its_own_key_and_under_its_owners(scan: ModuleType):
    operator = Recorded(FINETUNE_JOB, scan.CONTROLLER)
    operator.store("FineTuneScan", named("FineTuneScan", "s1", template=SPEC, learningRates=[1e-4]))
    asyncio.run(operator.settle())
    writes = operator.api.writes
    trial = next(obj for path, obj in operator.api.objects.items() if path.endswith("/nli-t0"))
    operator.reconciled.clear()
    operator.api.put("FineTuneJob", trial | {"status": {"phase": "Succeeded", "conditions": [DONE]}})
    operator.show("FineTuneJob", next(o for p, o in operator.api.objects.items() if p.endswith("/nli-t0")), "MODIFIED")
    asyncio.run(operator.settle())
    assert {SCAN, ObjectKey("FineTuneJob", "team", "nli-t0")} <= set(operator.reconciled)
    swept = next(obj for path, obj in operator.api.objects.items() if path.endswith("/finetunescans/nli"))
    assert swept["status"] == {"succeeded": 1}
    assert operator.api.writes > writes


def test_what_a_write_of_ours_changes_besides_is_reconciled_for_its_echo_is_left_out(scan: ModuleType):
    operator = Recorded(FINETUNE_JOB, scan.CONTROLLER)
    operator.store("FineTuneScan", named("FineTuneScan", "s1", template=SPEC, learningRates=[1e-4]))
    asyncio.run(operator.settle())
    trial = ObjectKey("FineTuneJob", "team", "nli-t0")
    assert operator.changed == [(trial, 0.0)], "a new object, at once"
    operator.changed.clear()
    asyncio.run(operator.reconciler(trial))
    assert set(operator.changed) == {(SCAN, OWNER_SECONDS)}, "its owner after its status was written, with others"


def test_what_is_created_waits_for_what_its_owner_has_still_to_create(scan: ModuleType):
    def plan(*given: Any) -> Any:
        made = scan.CONTROLLER.plan(*given)
        return replace(made, creates_more=bool(made.create))

    operator = Recorded(FINETUNE_JOB, replace(scan.CONTROLLER, plan=plan))
    operator.store("FineTuneScan", named("FineTuneScan", "s1", template=SPEC, learningRates=[1e-4]))
    asyncio.run(operator.settle())
    assert operator.changed == [(ObjectKey("FineTuneJob", "team", "nli-t0"), CREATES_MORE_SECONDS)]


def test_a_child_that_cannot_be_created_keeps_none_beside_it_from_it(scan: ModuleType):
    operator = Recorded(FINETUNE_JOB, scan.CONTROLLER)
    operator.api.put("FineTuneJob", named("FineTuneJob", "theirs", name="nli-t1", **SPEC))
    operator.store("FineTuneScan", named("FineTuneScan", "s1", template=SPEC, learningRates=[1e-4, 2e-4, 3e-4]))
    asyncio.run(operator.settle())
    owners = {
        path.rpartition("/")[2]: [owner["uid"] for owner in obj["metadata"].get("ownerReferences", [])]
        for path, obj in operator.api.objects.items()
        if "/finetunejobs/" in path
    }
    assert owners == {"nli-t0": ["s1"], "nli-t1": [], "nli-t2": ["s1"]}


def test_deleting_one_of_two_with_the_same_name_leaves_the_other(scan: ModuleType):
    cache = Cache(Registry(FINETUNE_JOB, scan.CONTROLLER))
    cache.put("FineTuneJob", named("FineTuneJob", "j1", **SPEC))
    cache.put("FineTuneScan", named("FineTuneScan", "s1"))
    assert set(cache.keys()) == {JOB, SCAN}
    assert cache.drop("FineTuneScan", named("FineTuneScan", "s1")) == (SCAN,)
    assert cache.keys() == [JOB]
    assert cache.snapshot(SCAN) is None and cache.snapshot(JOB) is not None


def test_every_kind_of_every_controller_is_listed_and_watched(scan: ModuleType):
    registry = Registry(FINETUNE_JOB, scan.CONTROLLER)
    assert list(registry.watched) == ["FineTuneJob", "FineTuneScan", "Job", "Pod"]
    selectors = kopf_settings(Settings(), registry).watching.label_selectors
    found = {(each.group, each.version, each.any_name): label for each, label in selectors.items()}
    assert found == {("batch", "v1", "jobs"): constants.LABEL_JOB, ("", "v1", "pods"): constants.LABEL_JOB}

    operator = Recorded(FINETUNE_JOB, scan.CONTROLLER)
    operator.api.put("FineTuneScan", named("FineTuneScan", "s1"))
    changed: list[ObjectKey] = []
    relister = Relister(
        operator.api, operator.cache, ("team",), 300, changed.append, lambda namespace: None, lambda: None
    )
    asyncio.run(relister.once())
    assert changed == [SCAN]


def test_the_operator_runs_two_controllers():
    assert [kind.name for kind in REGISTRY.reconciled] == [constants.KIND, constants.SWEEP_KIND]
