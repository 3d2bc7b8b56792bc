"""Events and Workloads -> what a job waits for, and until when that is said."""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import WaitReason
from finetune_operator.kube.errors import ApiError
from finetune_operator.watch.cache import MAX_WAIT_REASONS, Cache
from finetune_operator.watch.wait_reasons import (
    EVENT_SELECTORS,
    KUEUE_GROUP,
    WaitReasonUpdate,
    WaitReasonWatcher,
    from_event,
    from_workload,
)

Object = dict[str, Any]
KEY = ObjectKey("FineTuneJob", "team", "nli")
LABELS = {"finetune.dev/job": "nli", "finetune.dev/attempt": "1"}


def cache() -> Cache:
    """It holds the job, and a pod of it."""
    made = Cache()
    made.put("FineTuneJob", {"metadata": {"name": "nli", "namespace": "team", "uid": "j1", "resourceVersion": "1"}})
    owner = {"kind": "Job", "uid": "c1", "controller": True}
    for kind, name, uid, own in (("Job", "nli-1", "c1", owner | {"uid": "j1"}), ("Pod", "nli-1-x", "p1", owner)):
        meta = {"name": name, "namespace": "team", "uid": uid, "resourceVersion": "2", "labels": LABELS}
        made.put(kind, {"metadata": meta | {"ownerReferences": [own]}})
    return made


def follow(known: Cache, *updates: WaitReasonUpdate | None) -> list[ObjectKey]:
    """The keys that the updates change."""
    changed: list[ObjectKey] = []
    watcher = WaitReasonWatcher(None, known, (), changed.append)  # type: ignore[arg-type]
    for update in updates:
        watcher.apply(update)
    return changed


def said(known: Cache) -> dict[str, str]:
    snapshot = known.snapshot(KEY)
    assert snapshot is not None
    return {uid: reason.message for uid, reason in snapshot.wait_reasons.items()}


def event(message: str, **times: Any) -> Object:
    meta = {"namespace": "team"} | times.pop("metadata", {})
    about = {"uid": "p1", "kind": "Pod"}
    return {"metadata": meta, "involvedObject": about, "reason": "FailedMount", "message": message} | times


def workload(*conditions: tuple[str, str, str], checks: list[Object] | None = None) -> Object:
    listed = [{"type": kind, "status": status, "message": message} for kind, status, message in conditions]
    labels = {"kueue.x-k8s.io/job-uid": "c1"}
    return {
        "metadata": {"labels": labels, "namespace": "team"},
        "status": {"conditions": listed, "admissionChecks": checks or []},
    }


OLD, NEW = "2026-11-01T12:00:00Z", "2026-11-01T12:10:00Z"


@pytest.mark.parametrize(
    "when",
    [
        lambda at: {"lastTimestamp": at},
        lambda at: {"series": {"lastObservedTime": at}, "eventTime": OLD},
        lambda at: {"eventTime": at, "lastTimestamp": None},
        lambda at: {"metadata": {"creationTimestamp": at}},
    ],
)
def test_of_several_events_about_a_pod_the_latest_counts_in_whatever_order_they_are_replayed(when):
    older, newer = from_event(event("old", **when(OLD))), from_event(event("new", **when(NEW)))
    for order in ((older, newer), (newer, older), (newer, older, newer, older)):
        known = cache()
        news = follow(known, *order)
        assert said(known) == {"p1": "new"}
        assert len(news) == (2 if order[0] is older else 1), "a replay is no news"


def test_an_event_that_is_repeated_later_in_the_same_words_is_no_news():
    known = cache()
    words = [from_event(event("same", lastTimestamp=at)) for at in (OLD, NEW)]
    assert follow(known, *words) == [KEY]
    assert known.snapshot(KEY).wait_reasons["p1"].at == datetime(2026, 11, 1, 12, 10, tzinfo=UTC)


def test_what_is_told_in_another_namespace_is_not_about_our_objects():
    """Whoever can write events or Workloads in one namespace may name any uid."""
    known = cache()
    foreign = event("send your password to evil.example", metadata={"namespace": "evil"})
    theirs = workload(("QuotaReserved", "False", "never"))
    theirs["metadata"]["namespace"] = "evil"
    foreign["involvedObject"]["namespace"] = "team"
    assert follow(known, from_event(foreign), from_workload(theirs)) == []
    assert said(known) == {}
    ours = (from_event(event("ours")), from_workload(workload(("QuotaReserved", "False", "no quota"))))
    follow(known, *ours, from_event(foreign), from_event(foreign, deleted=True), from_workload(theirs, deleted=True))
    assert said(known) == {"p1": "ours", "c1": "no quota"}


def test_a_namespace_full_of_events_pushes_out_its_own_alone_and_none_is_long():
    known = cache()
    follow(known, from_event(event("ours")))
    for number in range(MAX_WAIT_REASONS + 5):
        flood = event("x" * 100_000, metadata={"namespace": "evil"})
        flood["involvedObject"]["uid"] = f"u{number}"
        update = from_event(flood)
        assert update and len(update.reason.message) <= 4096
        follow(known, update)
    assert said(known) == {"p1": "ours"}
    assert [known.wait_reason("evil", f"u{number}") is None for number in (0, 4, 5)] == [True, True, False]


def test_an_event_that_expires_is_no_longer_said_and_takes_no_other_with_it():
    known = cache()
    follow(known, from_event(event("one")))
    assert follow(known, from_event(event("another"), deleted=True)) == []
    assert follow(known, from_event(event("one"), deleted=True)) == [KEY]
    assert said(known) == {}


def test_a_workload_tells_of_quota_then_of_checks_and_falls_silent_once_admitted():
    known = cache()
    no_quota = workload(("QuotaReserved", "False", "couldn't assign flavors"))
    checks = [{"name": "ready", "state": "Ready"}, {"name": "prov", "state": "Pending", "message": "no capacity yet"}]
    reserved = workload(("QuotaReserved", "True", "reserved"), ("Admitted", "False", ""), checks=checks)
    admitted = workload(("QuotaReserved", "True", "reserved"), ("Admitted", "True", ""))
    follow(known, from_workload(no_quota))
    assert said(known) == {"c1": "couldn't assign flavors"}
    follow(known, from_workload(reserved))
    assert said(known) == {"c1": "quota is reserved; waiting for admission check prov (Pending): no capacity yet"}
    assert follow(known, from_workload(admitted)) == [KEY]
    assert said(known) == {}
    evicted = workload(("QuotaReserved", "False", "Preempted to accommodate a workload"), ("Evicted", "True", ""))
    follow(known, from_workload(evicted))
    assert said(known) == {"c1": "Preempted to accommodate a workload"}


def test_a_workload_that_is_gone_says_nothing():
    known = cache()
    waiting = workload(("QuotaReserved", "False", "no quota"))
    follow(known, from_workload(waiting), from_workload(waiting, deleted=True))
    assert said(known) == {}


def test_an_admitted_workload_leaves_the_job_controllers_words_alone():
    known = cache()
    known.set_wait_reason("team", "c1", WaitReason("FailedCreate", "exceeded quota"))
    assert follow(known, from_workload(workload(("QuotaReserved", "True", ""), ("Admitted", "True", "")))) == []
    assert said(known) == {"c1": "exceeded quota"}


@pytest.mark.parametrize("junk", [{}, {"metadata": {}, "status": {"conditions": "?"}}, workload()])
def test_what_cannot_be_read_says_nothing(junk: Object):
    assert from_workload(junk) is None
    assert from_event(junk) is None


def test_a_pod_that_cannot_be_set_up_is_watched_for():
    assert "involvedObject.kind=Pod,reason=FailedCreatePodSandBox" in EVENT_SELECTORS


class ClusterWithKueueLater:
    """Kueue is installed after a few questions, then upgraded: another version, and the old one is gone (simulated)."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.version: str | None = None

    async def request(self, method: str, where: str) -> Object:
        self.asked.append(where)
        if self.version is None:
            raise ApiError(404, "NotFound", "no such group")
        return {"preferredVersion": {"version": self.version}}

    async def watch(self, where: str, query: dict[str, str], seconds: int) -> AsyncIterator[Object]:
        if "/workloads" in where:
            self.asked.append(where)
            if f"/{self.version}/" not in where:
                raise ApiError(404, "NotFound", "no such version")
            said = f"no quota, says {self.version}"
            yield {"type": "MODIFIED", "object": workload(("QuotaReserved", "False", said))}
            return
        await asyncio.sleep(3600)
        yield {}


def test_kueue_is_found_when_it_is_installed_or_upgraded_later():
    known, cluster, news = cache(), ClusterWithKueueLater(), list[ObjectKey]()

    async def until_said(message: str) -> None:
        async with asyncio.timeout(5):
            while said(known).get("c1") != message:  # noqa: ASYNC110 (another task's state)
                await asyncio.sleep(0.01)

    async def act() -> None:
        watcher = WaitReasonWatcher(cluster, known, (), news.append, retry_seconds=(0.01,), kueue_seconds=0.01)  # type: ignore[arg-type]
        task = asyncio.create_task(watcher.run("auto"))
        await asyncio.sleep(0.1)
        assert cluster.asked == [f"/apis/{KUEUE_GROUP}"], "once, for no job waits in a queue"
        queued = {"name": "nli", "namespace": "team", "uid": "j1", "resourceVersion": "9"}
        known.put("FineTuneJob", {"metadata": queued, "status": {"phase": "Queued"}})
        await asyncio.sleep(0.1)
        assert set(cluster.asked) == {f"/apis/{KUEUE_GROUP}"} and len(cluster.asked) > 2
        for version in ("v1beta1", "v1beta2"):
            cluster.version = version
            await until_said(f"no quota, says {version}")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(act())
    assert KEY in news


def test_kueue_is_not_looked_for_where_it_is_switched_off():
    cluster = ClusterWithKueueLater()

    async def act() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await WaitReasonWatcher(cluster, cache(), (), lambda key: None).run("disabled")  # type: ignore[arg-type]

    asyncio.run(act())
    assert cluster.asked == []


def test_notices_come_from_events_and_workloads():
    missing = from_event(event('secret "x" not found'))
    assert missing == WaitReasonUpdate("team", "p1", WaitReason("FailedMount", 'secret "x" not found'))
    queued = from_workload(workload(("QuotaReserved", "False", "no quota")))
    assert queued == WaitReasonUpdate("team", "c1", WaitReason("Queued", "no quota"))
