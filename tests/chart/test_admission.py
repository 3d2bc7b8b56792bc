"""The chart's ValidatingAdmissionPolicy: what the operator's account may make, on a real kube-apiserver, and its image
patterns, which must allow what the operator's own rule allows.
"""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from finetune_operator.core.builders import job as builder
from finetune_operator.core.image_reference import is_allowed
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.core.policy import Rejection, read_spec
from finetune_operator.settings import Settings
from support.docs.chart import find, objects
from support.server.audit_log import ACCOUNT
from support.server.client import ApiError, Kube, wait_until
from support.server.server import Cluster

Object = dict[str, Any]
POLICY, BINDING = "ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"
SHA = "sha256:" + "ab" * 32
PATTERNS = [
    *(
        "trainer:1.*",
        "trainer:*",
        "trainer",
        "team*/trainer",
        "localhost/a:*",
        "*/*:2",
        "*.example.com/a",
        "r*.example.com/a",
    ),
    *("r.example.com/team/*", "r.example.com:5000/*:1", f"r.example.com/a@{SHA}", "r.example.com/a:1.*@sha256:*"),
]
NAMES = [
    *("trainer", "team/trainer", "localhost/a", "trainer:5000/evil", "team.evil.example/trainer", "evil.example.com/a"),
    *("r.example.com/team/a", "r.example.com/team/a/b", "r.example.com/a", "r.example.com:5000/a", "r1.example.com/a"),
    *("r.example.comx/team/a", "r.example.com.evil.example/team/a"),
]
ENDS = ["", ":1", ":1.0", ":2", ":latest", f"@{SHA}", f":1.0@{SHA}", f":2@{SHA}"]


def _conditions(values: Object) -> list[Callable[[str], bool]]:
    """The CEL conditions of the rendered policy, one for each pattern; RE2 and Python's re read these alike."""
    made = objects({"admissionPolicy": {"enabled": True}, **values})
    validations = [v for o in made if o["kind"] == POLICY for v in o["spec"]["validations"]]
    (expression,) = [v["expression"] for v in validations if "c.image ==" in v["expression"]]
    found = expression.split(" || ")[1:]

    def condition(text: str) -> Callable[[str], bool]:
        parts = re.findall(r"(!?)c\.image\.matches\(r'(.*?)'\)", text)
        assert parts
        return lambda image: all((re.search(regex, image) is None) == bool(negated) for negated, regex in parts)

    return [condition(text) for text in found]


def test_the_admission_policy_allows_the_images_that_the_operators_rule_allows() -> None:
    conditions = _conditions({"policy": {"allowedImages": PATTERNS}})
    assert len(conditions) == len(PATTERNS)
    for pattern, condition in zip(PATTERNS, conditions, strict=True):
        for image in (name + end for name in NAMES for end in ENDS):
            assert condition(image) == is_allowed(image, pattern), (pattern, image)


SPEC = {
    "model": {"source": "pvc://models/mistral"},
    "dataset": {"train": "s3://data/train.jsonl", "secretRef": {"name": "data"}},
    "output": {"uri": "s3://adapters/nli"},
}


def _owner(kube: Kube) -> str:
    """The uid of a job that is there: the garbage collector deletes what belongs to nothing."""
    made = kube.create(
        {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob", "metadata": {"name": "nli"}, "spec": SPEC}
    )
    return str(made["metadata"]["uid"])


def _job(namespace: str, uid: str, **spec: Any) -> Object:
    """What the operator builds for a job of that spec."""
    given = {"metadata": {"name": "nli", "namespace": namespace, "uid": uid}, "spec": SPEC | spec}
    owner = JobObject.from_api(given)
    read = read_spec(owner)
    assert not isinstance(read, Rejection)
    made = builder.build(owner, read, 1, None, Settings(node_selector={"pool": "gpu"}))[-1]
    made["spec"]["suspend"] = True
    return made


@pytest.fixture
def account(cluster: Cluster, namespace: str) -> Iterator[Kube]:
    """The operator's account in a namespace where the chart's policies are in force."""
    if not cluster.is_real:
        pytest.skip("the stand-in API server has no admission: `make envtest` fetches the real one")
    made = objects(
        {"admissionPolicy": {"enabled": True}, "policy": {"allowedImages": ["r.example.com/team/*"]}}, namespace
    )
    for kind in ("ServiceAccount", "Role", "RoleBinding"):
        cluster.kube.create(find(made, kind))
    policies = [obj for obj in made if obj["kind"] in (POLICY, BINDING)]
    for obj in policies:
        cluster.kube.create(obj)
    kube = Kube(cluster.access_of_service_account(namespace, ACCOUNT), namespace)
    yield kube
    kube.close()
    for obj in policies:
        cluster.kube.delete(obj["kind"], obj["metadata"]["name"])


def _is_in_force(kube: Kube, refused: Object) -> bool:
    """Whether the API server knows the policy already: it learns of it by a watch."""
    try:
        kube.create(refused, dryRun="All")
    except ApiError as error:
        return "(admissionPolicy)" in error.message
    return False


def _without_owner(job: Object) -> Object:
    return {**job, "metadata": {**job["metadata"], "ownerReferences": None}}


def _in(*path: str | int) -> Callable[[Object, Any], None]:
    def put(job: Object, value: Any) -> None:
        at: Any = job
        for part in path[:-1]:
            at = at[part] if isinstance(part, int) else at.setdefault(part, {})
        at[path[-1]] = value

    return put


POD = ("spec", "template", "spec")
CONTAINER = (*POD, "containers", 0)
#: place, value, words of the refusal
ATTACKS: list[tuple[Callable[[Object, Any], None], Any, str]] = [
    (_in(*CONTAINER, "image"), "evil.example.com/trainer:1", "policy.allowedImages"),
    (_in(*CONTAINER, "image"), "r.example.com.evil.example/team/a", "policy.allowedImages"),
    (_in(*CONTAINER, "command"), ["sh", "-c", "cat /var/run/secrets/finetune/*/*"], "command"),
    (_in(*POD, "initContainers"), [{"name": "a", "image": "finetune-trainer:0.1.0"}], "no init container"),
    (_in(*POD, "hostNetwork"), True, "no network"),
    (_in(*POD, "hostPID"), True, "no network"),
    (_in(*POD, "hostIPC"), True, "no network"),
    (_in(*POD, "nodeName"), "control-plane", "no network"),
    (_in(*POD, "volumes", 2), {"name": "tmp", "hostPath": {"path": "/"}}, "volumes"),
    (_in(*CONTAINER, "securityContext", "allowPrivilegeEscalation"), True, "restricted"),
    (_in(*CONTAINER, "securityContext", "capabilities"), {"drop": ["ALL"], "add": ["SYS_ADMIN"]}, "restricted"),
    (_in(*CONTAINER, "securityContext", "seccompProfile"), {"type": "Unconfined"}, "restricted"),
    (_in(*CONTAINER, "securityContext", "appArmorProfile"), {"type": "Unconfined"}, "restricted"),
    (_in(*POD, "securityContext", "seLinuxOptions"), {"type": "spc_t"}, "restricted"),
    (_in(*POD, "securityContext", "sysctls"), [{"name": "kernel.shm_rmid_forced", "value": "0"}], "restricted"),
    (_in(*POD, "securityContext", "seccompProfile", "type"), "Unconfined", "restricted"),
    (_in(*POD, "serviceAccountName"), "cluster-admin", "serviceAccountName"),
    (_in(*POD, "automountServiceAccountToken"), True, "token"),
    (_in(*CONTAINER, "envFrom"), [{"secretRef": {"name": "data"}}], "env"),
    (_in("metadata", "ownerReferences"), None, "ownerReferences"),
]


def test_the_operators_account_can_make_trainers_and_nothing_else(
    account: Kube, cluster: Cluster, namespace: str
) -> None:
    uid = _owner(Kube(cluster.access, namespace))
    lawful = _job(namespace, uid)
    wait_until(lambda: _is_in_force(account, _without_owner(lawful)), "the policy is in force")
    account.create(
        _job(namespace, uid, image="r.example.com/team/trainer:1", resources={"nodes": 2}, training={"batchSize": 32})
    )
    account.patch("Job", "nli-1", {"spec": {"suspend": True}})
    for number, (put, value, words) in enumerate(ATTACKS):
        attack = copy.deepcopy(lawful)
        attack["metadata"]["name"] = f"attack-{number}"
        put(attack, value)
        with pytest.raises(ApiError) as refused:
            account.create(attack)
        assert refused.value.code == 422, (number, refused.value)
        assert words in refused.value.message
        assert "(admissionPolicy)" in refused.value.message
        if value is not None:
            Kube(cluster.access, namespace).create(_without_owner(attack))  # nobody else is bound


def test_nobody_but_the_operator_makes_a_job_for_a_finetunejob(account: Kube, cluster: Cluster, namespace: str) -> None:
    anybody = Kube(cluster.access, namespace)
    lawful = _job(namespace, _owner(anybody))
    forged = {**lawful, "metadata": {**lawful["metadata"], "name": "nli-2"}}
    wait_until(lambda: _is_in_force(anybody, forged), "the policy is in force")
    account.create(lawful)
    anybody.patch("Job", "nli-1", {"spec": {"suspend": False}, "metadata": {"labels": {"a": "b"}}})  # as Kueue does
    anybody.create(_without_owner(forged))
    owners = forged["metadata"]["ownerReferences"]
    other = [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "x", "uid": "u-2"}]
    for taking in (
        lambda: anybody.create({**forged, "metadata": {**forged["metadata"], "name": "nli-3"}}),
        lambda: anybody.patch("Job", "nli-2", {"metadata": {"ownerReferences": owners}}),
        lambda: anybody.patch("Job", "nli-2", {"metadata": {"ownerReferences": [*other, *owners]}}),
        lambda: anybody.patch("Job", "nli-1", {"metadata": {"ownerReferences": [{**owners[0], "uid": "u-3"}]}}),
    ):
        with pytest.raises(ApiError) as refused:
            taking()
        assert "metadata.ownerReferences: only the operator may make Jobs" in refused.value.message
    anybody.patch("Job", "nli-2", {"metadata": {"ownerReferences": other}}, dryRun="All")
    for serves in (["a", "b"], None):
        watch = {"namespaces": serves} if serves else {"allNamespaces": True}
        made = objects({"admissionPolicy": {"enabled": True}, "watch": watch})
        (place,) = [
            o["spec"].get("matchResources") for o in made if o["kind"] == BINDING and "-owner" in o["metadata"]["name"]
        ]
        assert (place["namespaceSelector"]["matchExpressions"][0]["values"] if place else None) == serves
