"""The cache: what it lets in, what it forgets, and whose children are whose."""

from datetime import UTC, datetime
from typing import Any

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import Observed
from finetune_operator.core.objects.snapshot import observe
from finetune_operator.watch.cache import Cache

Object = dict[str, Any]
KEY = ObjectKey("FineTuneJob", "team", "nli")


def observed_in(cache: Cache) -> Observed:
    snapshot = cache.snapshot(KEY)
    assert snapshot is not None
    return observe(snapshot)


def job(uid: str = "j1", version: int = 5, **more: Any) -> Object:
    meta = {"name": "nli", "namespace": "team", "uid": uid, "resourceVersion": str(version)}
    return {"metadata": meta, "spec": {}} | more


def child(uid: str = "c1", owner: str = "j1", version: int = 6) -> Object:
    labels = {"finetune.dev/job": "nli", "finetune.dev/attempt": "1"}
    meta = {"name": "nli-1", "namespace": "team", "uid": uid, "resourceVersion": str(version), "labels": labels}
    return {"metadata": meta | {"ownerReferences": [{"uid": owner, "controller": True}]}, "spec": {}}


def confirm(cache: Cache) -> None:
    """A look by name finds nothing of what the watches call gone."""
    for doubt in cache.doubts(KEY):
        cache.tombstone(doubt.kind, doubt.uid)


def test_the_cache_takes_in_what_is_newer_and_says_whether_it_was():
    cache = Cache()
    assert cache.put("FineTuneJob", job(version=5)) == (KEY,)
    assert cache.put("FineTuneJob", job(version=5)) == (), "the echo of our own write"
    assert cache.put("FineTuneJob", job(version=4)) == (), "an answer that was overtaken"
    assert cache.put("FineTuneJob", job(version=10)) == (KEY,), "versions are numbers, not words"


def test_what_was_deleted_is_not_brought_back_by_a_late_answer():
    cache = Cache()
    cache.put("FineTuneJob", job())
    cache.put("Job", child())
    cache.drop("Job", child())
    confirm(cache)
    cache.put("Job", child(version=99))
    observed = observed_in(cache)
    assert observed.children == ()


def test_a_full_list_forgets_what_is_gone_but_nothing_younger_than_itself():
    cache = Cache()
    cache.put("FineTuneJob", job())
    cache.put("Job", child("old", version=6))
    cache.put("Job", child("young", version=9))
    assert cache.keep_only("Job", [], version=7) == {KEY}
    confirm(cache)
    observed = observed_in(cache)
    assert [c.uid for c in observed.children] == ["young"]


def test_children_of_an_earlier_job_of_the_same_name_are_not_ours():
    cache = Cache()
    cache.put("FineTuneJob", job("j2", version=20))
    cache.put("Job", child(owner="j1"))
    observed = observed_in(cache)
    assert observed.children == ()


def pod(uid: str, owner: str, phase: str = "Running", version: int = 7) -> Object:
    found = child(uid, owner, version)
    found["metadata"] |= {"name": f"nli-1-{uid}", "creationTimestamp": datetime.now(UTC).isoformat()}
    return found | {"status": {"phase": phase}}


def foreign_children(cache: Cache) -> tuple[str, ...]:
    observed = observed_in(cache)
    return observed.foreign_children


def test_what_an_earlier_job_of_the_same_name_still_runs_stands_in_the_way():
    cache = Cache()
    cache.put("FineTuneJob", job("j2", version=20))
    cache.put("Job", child(owner="j1"))
    assert foreign_children(cache) == ("Job nli-1",), "its pod may not be made yet"
    cache.put("Pod", pod("p1", owner="c1"))
    assert foreign_children(cache) == ("Job nli-1", "pod nli-1-p1")
    cache.put("Pod", pod("p1", owner="c1", phase="Failed", version=8))
    over = {"conditions": [{"type": "Failed", "status": "True"}]}
    cache.put("Job", child(owner="j1", version=9) | {"status": over})
    assert foreign_children(cache) == ()


def test_a_pod_of_an_earlier_job_is_in_the_way_also_when_its_job_is_gone_and_it_is_as_young_as_the_new_one():
    """Times are whole seconds: a job that is deleted and created again at once is as old as the pod of the first."""
    cache = Cache()
    cache.put("FineTuneJob", job("j1"))
    cache.put("Job", child("c1", owner="j1"))
    old = pod("p1", owner="c1")
    cache.put("Pod", old)
    cache.drop("FineTuneJob", job("j1"))
    again = job("j2", version=20)
    again["metadata"]["creationTimestamp"] = old["metadata"]["creationTimestamp"]
    cache.put("FineTuneJob", again)
    assert foreign_children(cache) == ("Job nli-1", "pod nli-1-p1")
    cache.drop("Job", child("c1", owner="j1", version=21))
    confirm(cache)
    cache.drop("Job", child("c1", owner="j1", version=21))
    assert foreign_children(cache) == ("pod nli-1-p1",)


def test_a_pod_of_our_own_deleted_job_is_ours():
    cache = Cache()
    cache.put("FineTuneJob", job("j1"))
    cache.put("Job", child("c1", owner="j1"))
    cache.put("Pod", pod("p1", owner="c1"))
    cache.drop("Job", child("c1", owner="j1", version=21))
    confirm(cache)
    observed = observed_in(cache)
    assert [found.uid for found in observed.pods] == ["p1"]
    assert foreign_children(cache) == ()


def test_a_job_that_nobody_controls_is_not_of_an_earlier_one():
    cache = Cache()
    cache.put("FineTuneJob", job("j2", version=20))
    foreign = child()
    foreign["metadata"]["name"] = "a-copy"
    del foreign["metadata"]["ownerReferences"]
    cache.put("Job", foreign)
    assert foreign_children(cache) == ()


def test_a_job_of_an_attempts_name_that_nobody_controls_is_in_the_way_under_any_label():
    cache = Cache()
    cache.put("FineTuneJob", job("j2", version=20))
    foreign = child()
    del foreign["metadata"]["ownerReferences"]
    cache.put("Job", foreign)
    assert foreign_children(cache) == ("Job nli-1",)


def owned(kind: str, owner: str, name: str, **labels: str) -> Object:
    reference = {"kind": kind, "name": owner, "uid": "j1" if kind == "FineTuneJob" else "c1", "controller": True}
    meta = {"name": name, "namespace": "team", "uid": name, "resourceVersion": "9", "labels": labels}
    return {"metadata": meta | {"ownerReferences": [reference]}, "status": {"phase": "Running"}}


def test_a_reference_to_the_owner_counts_more_than_a_label():
    cache = Cache()
    label = {"finetune.dev/job": "another"}
    assert cache.put("Job", owned("FineTuneJob", "nli", "nli-1", **label)) == (KEY,)
    assert cache.put("Pod", owned("Job", "nli-1", "nli-1-x7k2p", **label)) == (KEY,)
    assert cache.put("Pod", owned("Job", "somebody", "p", **label)) == (ObjectKey("FineTuneJob", "team", "another"),)


def test_what_could_write_is_not_gone_because_a_watch_or_a_list_says_so():
    cache = Cache()
    cache.put("FineTuneJob", job("j1"))
    made, running = owned("FineTuneJob", "nli", "nli-1"), owned("Job", "nli-1", "p1")
    for kind, obj in (("Job", made), ("Pod", running)):
        obj["metadata"]["labels"] = {"finetune.dev/job": "nli"}
        cache.put(kind, obj)
    cache.drop("Job", made)
    cache.keep_only("Pod", [], version=100)
    assert [(doubt.kind, doubt.name) for doubt in cache.doubts(KEY)] == [("Job", "nli-1"), ("Pod", "p1")]
    assert [child.name for child in observed_in(cache).children] == ["nli-1"]
    cache.put_unlabeled("Pod", running | {"metadata": running["metadata"] | {"labels": {}}}, KEY)
    assert observed_in(cache).unlabeled == ("Pod p1",)
    cache.tombstone("Job", "nli-1")
    cache.tombstone("Pod", "p1")
    assert (cache.doubts(KEY), observed_in(cache).children) == ([], ())


def full_list(cache: Cache, version: int, *objects: Object) -> None:
    is_back = cache.is_newer_than("FineTuneJob", "", version)
    for obj in objects:
        cache.put("FineTuneJob", obj, force=is_back)
    cache.keep_only("FineTuneJob", [obj["metadata"]["uid"] for obj in objects], version, force=is_back)


def version_of(cache: Cache) -> int:
    found = cache.owner(KEY)
    assert found is not None
    return found.version


def test_after_a_restore_of_etcd_the_full_list_wins():
    cache = Cache()
    full_list(cache, 1000, job(version=900))
    full_list(cache, 500, job(version=400))
    assert version_of(cache) == 400
    assert cache.put("FineTuneJob", job(version=401)) == (KEY,), "and so does what follows it"


def test_what_was_deleted_after_the_backup_is_back_after_the_restore():
    cache = Cache()
    full_list(cache, 1000, job())
    full_list(cache, 1100)
    assert cache.owner(KEY) is None
    full_list(cache, 1050, job())
    assert cache.owner(KEY) is not None


def test_an_ordinary_list_does_not_undo_what_was_seen_since():
    cache = Cache()
    full_list(cache, 1000, job(version=900))
    cache.put("FineTuneJob", job(version=1010))
    full_list(cache, 1005, job(version=900))
    assert version_of(cache) == 1010


def test_what_may_not_be_seen_is_put_aside_and_may_come_back():
    cache = Cache()
    cache.put("FineTuneJob", job())
    assert cache.evict_namespace("FineTuneJob", "another") == set()
    assert cache.evict_namespace("FineTuneJob", "team") == {KEY}
    assert cache.keys() == []
    assert cache.put("FineTuneJob", job()) == (KEY,)


def test_only_what_the_user_wants_counts_as_another_wish():
    cache = Cache()
    cache.put("FineTuneJob", job())
    before = cache.spec_identity("FineTuneJob", job())
    cache.put("FineTuneJob", job(version=6, status={"phase": "Training"}))
    assert cache.spec_identity("FineTuneJob", job()) == before
    changed = job(version=7)
    changed["metadata"]["generation"] = 2
    cache.put("FineTuneJob", changed)
    assert cache.spec_identity("FineTuneJob", job()) != before


def ended(rank: int, uid: str, code: int) -> Object:
    found = pod(uid, "c1", "Failed")
    found["metadata"]["labels"] |= {"batch.kubernetes.io/job-completion-index": str(rank)}
    state = {"terminated": {"exitCode": code, "finishedAt": datetime.now(UTC).isoformat()}}
    found["status"]["containerStatuses"] = [{"name": "trainer", "state": state}]
    return found


def test_of_deleted_pods_every_rank_is_remembered_until_the_job_says_how_it_ended():
    """The rank to blame may be any: with many nodes most pods are gone when the Job's end is seen."""
    cache = Cache()
    cache.put("FineTuneJob", job())
    cache.put("Job", child())
    for rank in range(40):
        cache.drop("Pod", ended(rank, f"p{rank}", code=65 if rank == 0 else 1))
    observed = observed_in(cache)
    assert {pod.index: pod.exit.code for pod in observed.pods if pod.exit} == {0: 65} | dict.fromkeys(range(1, 40), 1)


def test_a_deleted_pod_of_another_namespace_or_job_is_no_pod_of_ours_whomever_it_names_as_its_owner():
    cache = Cache()
    cache.put("FineTuneJob", job())
    cache.put("Job", child())
    for uid, change in (("p1", {"namespace": "evil"}), ("p2", {"labels": {"finetune.dev/job": "other"}})):
        pod = ended(0, uid, code=77)
        pod["metadata"] |= change
        cache.put("Pod", pod)
        cache.drop("Pod", pod)
    assert observed_in(cache).pods == ()


def test_a_rank_that_is_replaced_again_and_again_does_not_fill_the_memory():
    cache = Cache()
    cache.put("FineTuneJob", job())
    cache.put("Job", child())
    for turn in range(100):
        cache.drop("Pod", ended(turn % 2, f"p{turn}", code=75))
    observed = observed_in(cache)
    assert [pod.uid for pod in observed.pods] == [f"p{turn}" for turn in range(94, 100)]


def test_an_event_is_an_echo_when_it_shows_what_we_wrote_and_only_then():
    cache = Cache()
    made = {"metadata": {"name": "nli", "namespace": "team", "uid": "u", "resourceVersion": "7"}, "spec": {}}
    cache.put_own_write("FineTuneJob", made)
    assert not cache.is_echo("Job", 7)
    assert not cache.is_echo("FineTuneJob", 8)
    assert cache.is_echo("FineTuneJob", 7)
    assert not cache.is_echo("FineTuneJob", 7), "once: who watches anew is told again"
