"""Events and Workloads -> what a job waits for, and until when that is said."""

from datetime import UTC, datetime
from typing import Any

import pytest

from finetune_operator.cache import Cache
from finetune_operator.core.observed import Notice
from finetune_operator.notices import EVENT_SELECTORS, Notices, Word, of_event, of_workload

Object = dict[str, Any]
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


def follow(known: Cache, *words: Word | None) -> list[str]:
    """The keys that hear of news."""
    news: list[str] = []
    notices = Notices(None, known, (), news.append)  # type: ignore[arg-type]
    for word in words:
        notices._take(word)
    return news


def said(known: Cache) -> dict[str, str]:
    observed = known.observed("team/nli", None)
    assert observed is not None
    return {uid: notice.message for uid, notice in observed.notices.items()}


def event(message: str, **times: Any) -> Object:
    return {"involvedObject": {"uid": "p1", "kind": "Pod"}, "reason": "FailedMount", "message": message} | times


def workload(*conditions: tuple[str, str, str], checks: list[Object] | None = None) -> Object:
    listed = [{"type": kind, "status": status, "message": message} for kind, status, message in conditions]
    labels = {"kueue.x-k8s.io/job-uid": "c1"}
    return {"metadata": {"labels": labels}, "status": {"conditions": listed, "admissionChecks": checks or []}}


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
    older, newer = of_event(event("old", **when(OLD))), of_event(event("new", **when(NEW)))
    for order in ((older, newer), (newer, older), (newer, older, newer, older)):
        known = cache()
        news = follow(known, *order)
        assert said(known) == {"p1": "new"}
        assert len(news) == (2 if order[0] is older else 1), "a replay is no news"


def test_an_event_that_is_repeated_later_in_the_same_words_is_no_news():
    known = cache()
    words = [of_event(event("same", lastTimestamp=at)) for at in (OLD, NEW)]
    assert follow(known, *words) == ["team/nli"]
    assert known.observed("team/nli", None).notices["p1"].at == datetime(2026, 11, 1, 12, 10, tzinfo=UTC)


def test_an_event_that_expires_is_no_longer_said_and_takes_no_other_with_it():
    known = cache()
    follow(known, of_event(event("one")))
    assert follow(known, of_event(event("another"), deleted=True)) == []
    assert follow(known, of_event(event("one"), deleted=True)) == ["team/nli"]
    assert said(known) == {}


def test_a_workload_tells_of_quota_then_of_checks_and_falls_silent_once_admitted():
    known = cache()
    no_quota = workload(("QuotaReserved", "False", "couldn't assign flavors"))
    checks = [{"name": "ready", "state": "Ready"}, {"name": "prov", "state": "Pending", "message": "no capacity yet"}]
    reserved = workload(("QuotaReserved", "True", "reserved"), ("Admitted", "False", ""), checks=checks)
    admitted = workload(("QuotaReserved", "True", "reserved"), ("Admitted", "True", ""))
    follow(known, of_workload(no_quota))
    assert said(known) == {"c1": "couldn't assign flavors"}
    follow(known, of_workload(reserved))
    assert said(known) == {"c1": "quota is reserved; waiting for admission check prov (Pending): no capacity yet"}
    assert follow(known, of_workload(admitted)) == ["team/nli"]
    assert said(known) == {}
    evicted = workload(("QuotaReserved", "False", "Preempted to accommodate a workload"), ("Evicted", "True", ""))
    follow(known, of_workload(evicted))
    assert said(known) == {"c1": "Preempted to accommodate a workload"}


def test_a_workload_that_is_gone_says_nothing():
    known = cache()
    waiting = workload(("QuotaReserved", "False", "no quota"))
    follow(known, of_workload(waiting), of_workload(waiting, deleted=True))
    assert said(known) == {}


def test_an_admitted_workload_leaves_the_job_controllers_words_alone():
    known = cache()
    known.note("c1", Notice("FailedCreate", "exceeded quota"))
    assert follow(known, of_workload(workload(("QuotaReserved", "True", ""), ("Admitted", "True", "")))) == []
    assert said(known) == {"c1": "exceeded quota"}


@pytest.mark.parametrize("junk", [{}, {"metadata": {}, "status": {"conditions": "?"}}, workload()])
def test_what_cannot_be_read_says_nothing(junk: Object):
    assert of_workload(junk) is None
    assert of_event(junk) is None


def test_a_pod_that_cannot_be_set_up_is_watched_for():
    assert "involvedObject.kind=Pod,reason=FailedCreatePodSandBox" in EVENT_SELECTORS
