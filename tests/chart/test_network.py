"""NetworkPolicies: what each pod may reach, answered by evaluating the rendered rules (no packets are sent)."""

import ipaddress
from typing import Any

import pytest

from support.chart import NAMESPACE, find, objects, values_of

Object = dict[str, Any]
TRAINER = {"finetune.dev/job": "nli"}
OPERATOR = {
    "app.kubernetes.io/name": "finetune-operator",
    "app.kubernetes.io/instance": "tune",
    "app.kubernetes.io/component": "operator",
}
METADATA = ("169.254.169.254", "169.254.170.2", "100.100.100.200", "fd00:ec2::254")


def selects(selector: Object | None, labels: dict[str, str]) -> bool:
    """A label selector (matchLabels, matchExpressions with In and Exists) on `labels`."""
    if selector is None:
        return True
    expressions = selector.get("matchExpressions", [])
    assert all(e["operator"] in {"In", "Exists"} for e in expressions)
    return all(labels.get(k) == v for k, v in selector.get("matchLabels", {}).items()) and all(
        e["key"] in labels and (e["operator"] == "Exists" or labels[e["key"]] in e["values"]) for e in expressions
    )


def allows(policy: Object, direction: str, port: int | str, peer: Object, protocol: str = "TCP") -> bool:
    """Whether `policy` lets `direction` ("ingress", "egress") through for `peer`: {"ip"} or {"namespace", "labels"}."""
    assert {"Ingress", "Egress"} == set(policy["spec"]["policyTypes"])
    return any(
        any(_is_peer(entry, peer, policy["metadata"]["namespace"]) for entry in rule[_SIDE[direction]])
        and _is_port(rule, port, protocol)
        for rule in policy["spec"][direction]
    )


_SIDE = {"ingress": "from", "egress": "to"}


def _is_port(rule: Object, port: int | str, protocol: str) -> bool:
    return "ports" not in rule or any((p["port"], p["protocol"]) == (port, protocol) for p in rule["ports"])


def _is_peer(entry: Object, peer: Object, home: str) -> bool:
    if "ip" in peer:
        block, address = entry.get("ipBlock"), ipaddress.ip_address(peer["ip"])
        return (
            bool(block)
            and address in ipaddress.ip_network(block["cidr"])
            and not any(address in ipaddress.ip_network(cidr) for cidr in block.get("except", []))
        )
    if "ipBlock" in entry:
        return False
    names = {"kubernetes.io/metadata.name": peer["namespace"]}
    there = selects(entry["namespaceSelector"], names) if "namespaceSelector" in entry else peer["namespace"] == home
    return there and selects(entry.get("podSelector"), peer["labels"])


def policies(values: Object | None = None) -> tuple[Object, Object]:
    """The operator's and the trainers'."""
    found = objects(values)
    return (
        find(found, "NetworkPolicy", "tune-finetune-operator"),
        find(found, "NetworkPolicy", "tune-finetune-operator-trainers"),
    )


def test_each_policy_covers_its_pods_and_no_others() -> None:
    operator, trainers = policies()
    assert selects(operator["spec"]["podSelector"], OPERATOR)
    assert not selects(operator["spec"]["podSelector"], TRAINER)
    assert selects(trainers["spec"]["podSelector"], TRAINER)
    assert not selects(trainers["spec"]["podSelector"], OPERATOR)
    labels = find(objects(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert selects(operator["spec"]["podSelector"], labels)


@pytest.mark.parametrize("address", METADATA)
@pytest.mark.parametrize("port", [80, 443, 6443])
@pytest.mark.parametrize("name", ["defaults", "demo", "cluster-wide"])
def test_the_metadata_service_is_out_of_reach(address: str, port: int, name: str) -> None:
    for policy in (o for o in objects(values_of(name)) if o["kind"] == "NetworkPolicy"):
        assert not allows(policy, "egress", port, {"ip": address})


def test_the_operator_reaches_the_api_server_dns_and_progress_alone() -> None:
    operator, _ = policies()
    trainer = {"namespace": NAMESPACE, "labels": TRAINER}
    assert allows(operator, "egress", 6443, {"ip": "10.96.0.1"})
    assert allows(operator, "egress", 53, {"namespace": "kube-system", "labels": {"k8s-app": "kube-dns"}}, "UDP")
    assert allows(operator, "egress", 9400, trainer)
    assert not allows(operator, "egress", 22, trainer)
    assert not allows(operator, "egress", 9400, {"namespace": "elsewhere", "labels": TRAINER})
    assert not allows(operator, "egress", 9400, {"namespace": NAMESPACE, "labels": {"app": "database"}})
    assert not allows(operator, "egress", 80, {"ip": "93.184.216.34"})
    assert not allows(operator, "egress", 53, {"ip": "8.8.8.8"}, "UDP")


def test_a_trainer_reaches_hub_store_dns_and_its_own_kind_alone() -> None:
    _, trainers = policies()
    assert allows(trainers, "egress", 443, {"ip": "93.184.216.34"})
    assert allows(trainers, "egress", 53, {"namespace": "kube-system", "labels": {}}, "UDP")
    assert allows(trainers, "egress", 29500, {"namespace": NAMESPACE, "labels": TRAINER})
    assert not allows(trainers, "egress", 6443, {"ip": "10.96.0.1"})
    assert not allows(trainers, "egress", 80, {"ip": "93.184.216.34"})
    assert not allows(trainers, "egress", 5432, {"namespace": NAMESPACE, "labels": {"app": "database"}})
    assert not allows(trainers, "egress", 29500, {"namespace": "elsewhere", "labels": TRAINER})


def test_progress_and_metrics_are_read_by_the_operator_and_by_monitoring_alone() -> None:
    operator, trainers = policies()
    assert allows(trainers, "ingress", 9400, {"namespace": NAMESPACE, "labels": OPERATOR})
    for policy, port in ((trainers, 9400), (operator, "http")):
        assert allows(policy, "ingress", port, {"namespace": "monitoring", "labels": {"app": "prometheus"}})
        assert not allows(policy, "ingress", port, {"namespace": "elsewhere", "labels": {"app": "prometheus"}})
        assert not allows(policy, "ingress", port, {"namespace": NAMESPACE, "labels": {"app": "database"}})


def test_an_operator_for_every_namespace_reads_progress_in_every_namespace() -> None:
    operator = find(objects({"watch": {"allNamespaces": True}}), "NetworkPolicy", "tune-finetune-operator")
    assert allows(operator, "egress", 9400, {"namespace": "anywhere", "labels": TRAINER})
    assert not allows(operator, "egress", 9400, {"namespace": "anywhere", "labels": {"app": "database"}})


def test_the_trial_lets_trainers_reach_its_store_and_prometheus_reach_both() -> None:
    values = values_of("demo")
    operator, trainers = policies(values)
    pods = {o["metadata"]["name"]: o["spec"]["template"]["metadata"]["labels"] for o in objects(values)
            if o["kind"] == "Deployment"}  # fmt: skip
    store = {"namespace": NAMESPACE, "labels": pods["tune-finetune-operator-demo-s3"]}
    prometheus = {"namespace": NAMESPACE, "labels": pods["tune-finetune-operator-demo-prometheus"]}
    assert allows(trainers, "egress", 5000, store)
    assert not allows(operator, "egress", 5000, store)
    assert allows(operator, "ingress", "http", prometheus)
    assert allows(trainers, "ingress", 9400, prometheus)
