"""What the tests rely on in a Kubernetes API. The real server and the stand-in have to behave alike.

Every test runs on each kind of cluster that can run here, so the stand-in never proves what the real one would not do.
"""

import copy
import itertools
import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.server.client import (
    APPLY,
    JSON_PATCH,
    STRATEGIC,
    Access,
    ApiError,
    Kube,
    Object,
    wait_until,
)
from support.server.server import (
    STANDIN,
    Cluster,
    assets,
    start,
)

CONFIG = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "1"}}
TINY: Object = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "nli"},
    "spec": {
        "model": {"source": "hf://a/b"},
        "dataset": {"train": "s3://data/x"},
        "output": {"uri": "s3://out/x"},
    },
}


def config(name: str, owner: Object | None = None, **labels: str) -> Object:
    body = copy.deepcopy(CONFIG)
    body["metadata"] |= {"name": name, "labels": labels}
    if owner:
        keys = {"apiVersion": owner["apiVersion"], "kind": owner["kind"]}
        reference = keys | {"name": owner["metadata"]["name"], "uid": owner["metadata"]["uid"]}
        body["metadata"]["ownerReferences"] = [reference]
    return body


def refused(code: int, call: Callable[[], Any]) -> ApiError:
    with pytest.raises(ApiError) as refusal:
        call()
    assert refusal.value.code == code, refusal.value
    return refusal.value


# Reading and writing


def test_create_get_list_delete(everywhere: Kube):
    made = everywhere.create(CONFIG)
    assert made["metadata"]["uid"]
    assert made["metadata"]["namespace"] == everywhere.namespace
    assert everywhere.get("ConfigMap", "c") == made
    assert [obj["metadata"]["name"] for obj in everywhere.list("ConfigMap")] == ["c"]
    everywhere.delete("ConfigMap", "c")
    assert refused(404, lambda: everywhere.get("ConfigMap", "c")).reason == "NotFound"


def test_a_taken_name_is_a_conflict(everywhere: Kube):
    everywhere.create(CONFIG)
    assert refused(409, lambda: everywhere.create(CONFIG)).reason == "AlreadyExists"


def test_generated_names_differ(everywhere: Kube):
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"generateName": "made-"}}
    names = {everywhere.create(body)["metadata"]["name"] for _ in range(5)}
    assert len(names) == 5
    assert all(name.startswith("made-") and len(name) == len("made-") + 5 for name in names)


def test_nothing_is_created_in_a_namespace_that_does_not_exist(everywhere: Kube):
    stranger = Kube(everywhere.access, "no-such-namespace")
    refused(404, lambda: stranger.create(CONFIG))


def test_a_stale_resource_version_is_a_conflict(everywhere: Kube):
    old = everywhere.create(CONFIG)
    everywhere.patch("ConfigMap", "c", {"data": {"a": "2"}})
    error = refused(409, lambda: everywhere.replace(old | {"data": {"a": "3"}}))
    assert error.reason == "Conflict"
    assert "the object has been modified" in error.message
    stale = {"metadata": {"resourceVersion": old["metadata"]["resourceVersion"]}, "data": {"a": "3"}}
    refused(409, lambda: everywhere.patch("ConfigMap", "c", stale))


def test_writing_the_same_again_changes_nothing(everywhere: Kube):
    made = everywhere.create(CONFIG)
    again = everywhere.patch("ConfigMap", "c", {"data": {"a": "1"}})
    assert again["metadata"]["resourceVersion"] == made["metadata"]["resourceVersion"]
    applied = everywhere.apply(CONFIG)
    second = everywhere.apply(CONFIG)
    assert second["metadata"]["resourceVersion"] == applied["metadata"]["resourceVersion"]


def test_a_dry_run_stores_nothing(everywhere: Kube):
    everywhere.create(CONFIG, dryRun="All")
    assert everywhere.find("ConfigMap", "c") is None
    everywhere.create(CONFIG)
    changed = everywhere.patch("ConfigMap", "c", {"data": {"a": "2"}}, dryRun="All")
    assert changed["data"] == {"a": "2"}
    assert everywhere.get("ConfigMap", "c")["data"] == {"a": "1"}


def test_selectors(everywhere: Kube):
    for name, labels in (("x", {"app": "one"}), ("y", {"app": "two"}), ("z", {})):
        everywhere.create(config(name, **labels))

    def found(**query: str) -> str:
        return "".join(obj["metadata"]["name"] for obj in everywhere.list("ConfigMap", **query))

    assert found(labelSelector="app=one") == "x"
    assert found(labelSelector="app!=one") == "yz"
    assert found(labelSelector="app in (one, two)") == "xy"
    assert found(labelSelector="app notin (one)") == "yz"
    assert found(labelSelector="app") == "xy"
    assert found(labelSelector="!app") == "z"
    assert found(labelSelector="app,app!=two") == "x"
    assert found(fieldSelector="metadata.name=y") == "y"
    assert found(fieldSelector="metadata.name!=y") == "xz"


def test_delete_collection_takes_what_is_selected(everywhere: Kube):
    for name, labels in (("x", {"app": "one"}), ("y", {"app": "two"})):
        everywhere.create(config(name, **labels))
    path = f"/api/v1/namespaces/{everywhere.namespace}/configmaps"
    everywhere.request("DELETE", path, params={"labelSelector": "app=one"})
    assert [obj["metadata"]["name"] for obj in everywhere.list("ConfigMap")] == ["y"]


# Patches


def test_a_merge_patch_removes_what_is_null(everywhere: Kube):
    everywhere.create(CONFIG | {"data": {"a": "1", "b": "2"}})
    assert everywhere.patch("ConfigMap", "c", {"data": {"a": None, "c": "3"}})["data"] == {"b": "2", "c": "3"}


def test_a_failed_json_patch_test_is_unprocessable_and_changes_nothing(everywhere: Kube):
    everywhere.create(CONFIG)
    good = [{"op": "test", "path": "/data/a", "value": "1"}, {"op": "replace", "path": "/data/a", "value": "2"}]
    assert everywhere.patch("ConfigMap", "c", good, content_type=JSON_PATCH)["data"] == {"a": "2"}
    assert refused(422, lambda: everywhere.patch("ConfigMap", "c", good, content_type=JSON_PATCH)).reason == "Invalid"
    assert everywhere.get("ConfigMap", "c")["data"] == {"a": "2"}


def test_a_strategic_patch_merges_conditions_by_type(everywhere: Kube):
    container = {"name": "main", "image": "example.org/x:1"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]}}
    everywhere.create(pod)
    for kind in ("First", "Second"):
        status = {"status": {"conditions": [{"type": kind, "status": "True"}]}}
        patched = everywhere.patch("Pod", "p", status, subresource="status", content_type=STRATEGIC)
    assert {"First", "Second"} <= {condition["type"] for condition in patched["status"]["conditions"]}


def test_custom_resources_take_no_strategic_patch(everywhere: Kube):
    everywhere.create(TINY)
    refused(415, lambda: everywhere.patch("FineTuneJob", "nli", {"spec": {}}, content_type=STRATEGIC))


def test_apply_creates_then_updates_and_takes_back_what_is_left_out(everywhere: Kube):
    everywhere.apply(CONFIG | {"data": {"a": "1", "b": "2"}}, manager="us")
    everywhere.patch("ConfigMap", "c", {"data": {"theirs": "3"}})
    assert everywhere.apply(CONFIG | {"data": {"a": "9"}}, manager="us")["data"] == {"a": "9", "theirs": "3"}


def test_apply_needs_a_manager(everywhere: Kube):
    path = f"/api/v1/namespaces/{everywhere.namespace}/configmaps/c"
    error = refused(422, lambda: everywhere.request("PATCH", path, CONFIG, None, APPLY))
    assert "fieldManager" in error.message


def test_applying_a_job_again_changes_nothing(everywhere: Kube):
    container = {"name": "main", "image": "example.org/x:1", "env": [{"name": "A", "value": "1"}]}
    spec = {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}, "suspend": True}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": spec}
    everywhere.apply(job, manager="us")
    wait_until(lambda: everywhere.list("Job"), "the Job is there")
    generation = everywhere.get("Job", "j")["metadata"]["generation"]
    assert everywhere.apply(job, manager="us")["metadata"]["generation"] == generation
    found = everywhere.get("Job", "j")
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert labels["batch.kubernetes.io/job-name"] == "j"
    assert labels["batch.kubernetes.io/controller-uid"] == found["metadata"]["uid"]


def test_a_jobs_template_is_immutable_once_it_started(everywhere: Kube):
    container = {"name": "main", "image": "example.org/x:1"}
    spec: Object = {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
    everywhere.create({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}, "spec": spec})
    spec["template"]["spec"]["containers"][0]["image"] = "example.org/y:1"
    error = refused(422, lambda: everywhere.patch("Job", "j", {"spec": spec}, content_type=STRATEGIC))
    assert "field is immutable" in error.message


# Watching


class Watcher(threading.Thread):
    """Collects watch events until it has `count`, or for some seconds."""

    def __init__(self, kube: Kube, kind: str, count: int, **query: str) -> None:
        super().__init__(daemon=True)
        self.kube, self.kind, self.count, self.query = Kube(kube.access, kube.namespace), kind, count, query
        self.events: list[tuple[str, str]] = []
        self.start()

    def run(self) -> None:
        for event in self.kube.watch(self.kind, seconds=20, **self.query):
            self.events.append((event["type"], event["object"]["metadata"].get("name", "")))
            if len(self.events) >= self.count:
                return

    def result(self) -> list[tuple[str, str]]:
        self.join(25)
        self.kube.close()
        return self.events


def revision(kube: Kube) -> str:
    path = f"/api/v1/namespaces/{kube.namespace}/configmaps"
    return str(kube.request("GET", path)["metadata"]["resourceVersion"])


def test_a_watch_tells_what_happens_after_its_revision(everywhere: Kube):
    everywhere.create(config("before"))
    watcher = Watcher(everywhere, "ConfigMap", 3, resourceVersion=revision(everywhere))
    everywhere.create(config("c"))
    everywhere.patch("ConfigMap", "c", {"data": {"a": "2"}})
    everywhere.delete("ConfigMap", "c")
    assert watcher.result() == [("ADDED", "c"), ("MODIFIED", "c"), ("DELETED", "c")]


def test_a_watch_can_look_back(everywhere: Kube):
    since = revision(everywhere)
    everywhere.create(config("c"))
    everywhere.delete("ConfigMap", "c")
    watcher = Watcher(everywhere, "ConfigMap", 2, resourceVersion=since)
    assert watcher.result() == [("ADDED", "c"), ("DELETED", "c")]


def test_what_leaves_a_watchs_selector_is_deleted_for_it(everywhere: Kube):
    watcher = Watcher(everywhere, "ConfigMap", 2, resourceVersion=revision(everywhere), labelSelector="app=one")
    everywhere.create(config("other", app="two"))
    everywhere.create(config("c", app="one"))
    everywhere.patch("ConfigMap", "c", {"metadata": {"labels": {"app": "two"}}})
    assert watcher.result() == [("ADDED", "c"), ("DELETED", "c")]


def test_a_revision_from_before_history_is_expired(tmp_path: Path):
    """The stand-in alone, for a real server forgets only after minutes: 410 is what both answer then."""
    with start(STANDIN, history=10) as cluster, cluster.namespace() as namespace:
        kube = Kube(cluster.access, namespace)
        since = revision(kube)
        for number in range(20):
            kube.create(config(f"c{number}"))
        error = refused(410, lambda: next(kube.watch("ConfigMap", resourceVersion=since)))
        assert error.reason == "Expired"
        kube.close()


# Custom resources


def test_generation_counts_changes_of_the_spec_alone(everywhere: Kube):
    assert everywhere.create(TINY)["metadata"]["generation"] == 1
    labeled = everywhere.patch("FineTuneJob", "nli", {"metadata": {"labels": {"a": "b"}}})
    assert labeled["metadata"]["generation"] == 1
    assert everywhere.patch("FineTuneJob", "nli", {"spec": {"suspend": True}})["metadata"]["generation"] == 2


def test_status_given_at_creation_is_dropped(everywhere: Kube):
    assert "status" not in everywhere.create(TINY | {"status": {"phase": "Succeeded"}})


def test_unknown_fields_are_dropped_unless_strictness_is_asked_for(everywhere: Kube):
    body = copy.deepcopy(TINY)
    body["spec"]["lora"] = {"rnak": 8}
    error = refused(400, lambda: everywhere.create(body, fieldValidation="Strict"))
    assert 'unknown field "spec.lora.rnak"' in error.message
    assert "rnak" not in everywhere.create(body)["spec"]["lora"]


def test_conditions_are_merged_by_type_when_applied(everywhere: Kube):
    everywhere.create(TINY)
    at = "2026-01-01T00:00:00Z"
    for manager, kind in (("one", "Accepted"), ("two", "Scheduled")):
        condition = {"type": kind, "status": "True", "reason": "Good", "lastTransitionTime": at}
        body = {key: TINY[key] for key in ("apiVersion", "kind")} | {"metadata": {"name": "nli"}}
        body["status"] = {"conditions": [condition]}
        path = f"/apis/finetune.dev/v1alpha1/namespaces/{everywhere.namespace}/finetunejobs/nli/status"
        applied = everywhere.request("PATCH", path, body, {"fieldManager": manager}, APPLY)
    assert [condition["type"] for condition in applied["status"]["conditions"]] == ["Accepted", "Scheduled"]


# Deletion


def test_what_an_object_owns_goes_with_it(everywhere: Kube):
    owner = everywhere.create(TINY)
    child = everywhere.create(config("child", owner))
    everywhere.create(config("grandchild", child))
    everywhere.create(config("bystander"))
    everywhere.delete("FineTuneJob", "nli")
    wait_until(lambda: not everywhere.find("ConfigMap", "grandchild"), "the grandchild is gone")
    assert everywhere.find("ConfigMap", "child") is None
    assert everywhere.find("ConfigMap", "bystander") is not None


def test_an_orphan_stays(everywhere: Kube):
    owner = everywhere.create(TINY)
    everywhere.create(config("child", owner))
    everywhere.delete("FineTuneJob", "nli", propagationPolicy="Orphan")
    wait_until(lambda: not everywhere.find("FineTuneJob", "nli"), "the owner is gone")
    wait_until(lambda: not everywhere.get("ConfigMap", "child")["metadata"].get("ownerReferences"), "it is let go")


def test_foreground_deletion_waits_for_what_is_owned(everywhere: Kube):
    owner = everywhere.create(TINY)
    everywhere.create(config("child", owner))
    everywhere.patch("ConfigMap", "child", {"metadata": {"finalizers": ["example.org/hold"]}})
    body = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Foreground"}
    path = f"/apis/finetune.dev/v1alpha1/namespaces/{everywhere.namespace}/finetunejobs/nli"
    child = everywhere.get("ConfigMap", "child")
    child["metadata"]["ownerReferences"][0]["blockOwnerDeletion"] = True
    everywhere.replace(child)
    everywhere.request("DELETE", path, body)
    wait_until(lambda: everywhere.get("ConfigMap", "child")["metadata"].get("deletionTimestamp"), "the child is asked")
    assert everywhere.get("FineTuneJob", "nli")["metadata"]["deletionTimestamp"]
    everywhere.patch("ConfigMap", "child", {"metadata": {"finalizers": None}})
    wait_until(lambda: not everywhere.find("FineTuneJob", "nli"), "the owner is gone")


def test_a_child_of_an_owner_that_is_gone_is_collected(everywhere: Kube):
    owner = everywhere.create(TINY)
    everywhere.delete("FineTuneJob", "nli")
    wait_until(lambda: not everywhere.find("FineTuneJob", "nli"), "the owner is gone")
    everywhere.create(config("late", owner))
    wait_until(lambda: not everywhere.find("ConfigMap", "late"), "the late child is gone")


def test_an_owner_of_the_same_name_but_another_uid_keeps_nothing(everywhere: Kube):
    first = everywhere.create(TINY)
    everywhere.delete("FineTuneJob", "nli")
    wait_until(lambda: not everywhere.find("FineTuneJob", "nli"), "the first is gone")
    second = everywhere.create(TINY)
    everywhere.create(config("of-first", first))
    everywhere.create(config("of-second", second))
    wait_until(lambda: not everywhere.find("ConfigMap", "of-first"), "the first's child is gone")
    assert everywhere.find("ConfigMap", "of-second")


def test_a_finalizer_holds_an_object(everywhere: Kube):
    everywhere.create(CONFIG)
    everywhere.patch("ConfigMap", "c", {"metadata": {"finalizers": ["example.org/hold"]}})
    everywhere.delete("ConfigMap", "c")
    assert everywhere.get("ConfigMap", "c")["metadata"]["deletionTimestamp"]
    everywhere.patch("ConfigMap", "c", {"metadata": {"finalizers": None}})
    assert everywhere.find("ConfigMap", "c") is None


def test_a_deletion_can_be_bound_to_a_uid(everywhere: Kube):
    everywhere.create(CONFIG)
    wrong = {"uid": "11111111-1111-1111-1111-111111111111"}
    refused(409, lambda: everywhere.delete("ConfigMap", "c", preconditions=wrong))
    assert everywhere.find("ConfigMap", "c")


def test_a_namespace_goes_with_all_in_it(every_cluster: Cluster):
    with every_cluster.namespace() as namespace:
        kube = Kube(every_cluster.access, namespace)
        kube.create(TINY)
        kube.create(CONFIG)
    wait_until(lambda: not kube.find("Namespace", namespace), "the namespace is gone")
    assert kube.find("FineTuneJob", "nli") is None
    kube.close()


# Access


def test_a_service_account_may_do_what_its_role_says_and_no_more(every_cluster: Cluster, everywhere: Kube):
    if not every_cluster.is_real:
        pytest.skip("the stand-in has no RBAC")
    namespace = str(everywhere.namespace)
    rbac = "rbac.authorization.k8s.io"
    everywhere.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "reader"}})
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list"]}]
    everywhere.create({"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": "reader"}, "rules": rules})
    subject = {"kind": "ServiceAccount", "name": "reader", "namespace": namespace}
    binding = {"roleRef": {"apiGroup": rbac, "kind": "Role", "name": "reader"}, "subjects": [subject]}
    everywhere.create({"apiVersion": f"{rbac}/v1", "kind": "RoleBinding", "metadata": {"name": "reader"}} | binding)
    reader = Kube(every_cluster.access_of_service_account(namespace, "reader"), namespace)

    def allowed() -> bool:
        try:
            return bool(reader.list("ConfigMap") is not None)
        except ApiError as error:
            assert error.code == 403
            return False

    wait_until(allowed, "the role is known to the authorizer")
    error = refused(403, lambda: reader.list("Secret"))
    assert f'User "system:serviceaccount:{namespace}:reader" cannot list resource "secrets"' in error.message
    refused(403, lambda: reader.create(CONFIG))
    refused(401, lambda: Kube(Access(everywhere.access.server, "wrong", everywhere.access.ca_file)).list("ConfigMap"))
    reader.close()


# kubectl


@pytest.fixture
def kubectl(every_cluster: Cluster, everywhere: Kube, tmp_path: Path) -> Callable[..., str]:
    """The real kubectl, in the test's namespace."""
    program = shutil.which("kubectl", path=str(assets())) or shutil.which("kubectl")
    if program is None:
        pytest.skip("no kubectl here")

    def run(*arguments: str, manifest: Object | None = None, code: int = 0) -> str:
        command = [program, f"--kubeconfig={every_cluster.kubeconfig}", f"--namespace={everywhere.namespace}"]
        command += [f"--cache-dir={tmp_path}", *arguments]
        text = json.dumps(manifest) if manifest else None
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    return run


def test_kubectl_applies_changes_waits_and_deletes(everywhere: Kube, kubectl: Callable[..., str]):
    assert "created" in kubectl("apply", "-f", "-", manifest=TINY)
    assert "unchanged" in kubectl("apply", "-f", "-", manifest=TINY)
    changed = copy.deepcopy(TINY)
    changed["spec"]["suspend"] = True
    assert "configured" in kubectl("apply", "-f", "-", manifest=changed)
    assert everywhere.get("FineTuneJob", "nli")["spec"]["suspend"] is True
    at = "2026-01-01T00:00:00Z"
    condition = {"type": "Finished", "status": "True", "reason": "Failed", "lastTransitionTime": at}
    condition["observedGeneration"] = 2  # kubectl waits on while this is older than the object's generation
    everywhere.patch("FineTuneJob", "nli", {"status": {"conditions": [condition]}}, subresource="status")
    assert "condition met" in kubectl("wait", "ftj/nli", "--for=condition=Finished", "--timeout=20s")
    assert "nli" in kubectl("get", "ftj")
    assert "deleted" in kubectl("delete", "ftj", "nli")
    assert everywhere.find("FineTuneJob", "nli") is None


def test_kubectl_shows_why_a_manifest_is_refused(kubectl: Callable[..., str]):
    wrong = copy.deepcopy(TINY)
    wrong["spec"]["lora"] = {"rank": -1}
    said = kubectl("apply", "-f", "-", manifest=wrong, code=1)
    assert "spec.lora.rank" in said
    assert "should be greater than or equal to 1" in said
    wrong["spec"]["lora"] = {"rnak": 1}
    assert 'unknown field "spec.lora.rnak"' in kubectl("apply", "-f", "-", manifest=wrong, code=1)


def test_kubectl_prints_the_columns_of_the_crd(everywhere: Kube, kubectl: Callable[..., str]):
    everywhere.create(TINY)
    status = {"phase": "Training", "progress": {"step": 5, "summary": "5/20", "loss": 1.25}}
    everywhere.patch("FineTuneJob", "nli", {"status": status}, subresource="status")
    header, row = kubectl("get", "finetunejobs").splitlines()
    assert header.split() == ["NAME", "PHASE", "STEP", "LOSS", "ETA", "ADAPTER", "AGE"]
    assert row.split()[:4] == ["nli", "Training", "5/20", "1.25"]


def test_many_objects_arrive_in_order(everywhere: Kube):
    watcher = Watcher(everywhere, "ConfigMap", 300, resourceVersion=revision(everywhere))
    names = [f"c{number:03}" for number in range(300)]
    for name in names:
        everywhere.create(config(name))
    assert watcher.result() == list(zip(itertools.repeat("ADDED"), names, strict=False))
