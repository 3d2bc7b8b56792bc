"""NetworkPolicies: what each pod may reach, answered by evaluating the rendered rules (no packets are sent)."""

import ipaddress
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml

from finetune_operator.core.builders import torchrun
from support.docs.chart import (
    CHART,
    NAMESPACE,
    find,
    objects,
    render,
    values_of,
)

Object = dict[str, Any]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
DENIED = [
    ipaddress.ip_network(cidr)
    for cidr in yaml.safe_load((CHART / "values.yaml").read_text())["networkPolicy"]["deniedCidrs"]
]
TRAINER = {"finetune.dev/job": "nli"}
OPERATOR = {
    "app.kubernetes.io/name": "finetune-operator",
    "app.kubernetes.io/instance": "tune",
    "app.kubernetes.io/component": "operator",
}
METADATA = (
    "169.254.169.254",
    "169.254.170.2",
    "100.100.100.200",
    "168.63.129.16",
    "fe80::a9fe:a9fe",
    "fd00:ec2::254",
    "fd20:ce::254",
    "fd00:c1::a9fe:a9fe",
)


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


def around_the_denied() -> Iterator[Network]:
    """Blocks of many sizes: each holds a denied one, or lies beside one that does."""
    for denied in DENIED:
        for length in range(0, denied.prefixlen, 1 if denied.version == 4 else 5):
            holds = denied.supernet(new_prefix=length)
            yield holds
            if length:
                (beside,) = set(holds.supernet().subnets()) - {holds}
                yield beside


@pytest.mark.parametrize("setting", ["httpsCidrs", "extraEgress"])
def test_denied_blocks_are_cut_out_of_every_block_that_holds_them(setting: str) -> None:
    opened = [block for block in around_the_denied() if not any(_inside(block, denied) for denied in DENIED)]
    assert len(opened) > 200
    cidrs = [str(block) for block in opened]
    rule = {"to": [{"ipBlock": {"cidr": cidr}} for cidr in cidrs]}
    _, trainers = policies({"networkPolicy": {"trainer": {setting: cidrs if setting == "httpsCidrs" else [rule]}}})
    rendered = [entry["ipBlock"] for rule in trainers["spec"]["egress"] for entry in rule["to"] if "ipBlock" in entry]
    found = {block["cidr"]: block.get("except", []) for block in rendered}
    assert {cidr: found[cidr] for cidr in cidrs} == {
        str(block): [str(denied) for denied in DENIED if _inside(denied, block)] for block in opened
    }


def _inside(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)


def test_egress_rules_of_the_users_keep_what_else_they_say() -> None:
    rule = {
        "to": [{"ipBlock": {"cidr": "0.0.0.0/1", "except": ["10.0.0.0/8"]}}, {"podSelector": {"matchLabels": TRAINER}}],
        "ports": [{"protocol": "TCP", "port": 80}],
    }
    for policy, role in zip(policies({"networkPolicy": {"operator": {"extraEgress": [rule]},
                                                        "trainer": {"extraEgress": [rule]}}}),
                            ("operator", "trainer"), strict=True):  # fmt: skip
        assert policy["spec"]["egress"][-1] == {
            **rule,
            "to": [{"ipBlock": {"cidr": "0.0.0.0/1", "except": ["10.0.0.0/8", "100.100.100.200/32"]}}, rule["to"][1]],
        }, role


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("trainer.httpsCidrs", ["169.254.169.254/32"]),
        ("trainer.httpsCidrs", ["10.0.0.0/8", "fd00:00c1:0::a9fe:a9fe/128"]),
        ("apiServer.cidrs", ["169.254.0.0/16"]),
        ("operator.extraEgress", [{"to": [{"ipBlock": {"cidr": "168.63.129.16/32"}}]}]),
        ("trainer.extraEgress", [{"to": [{"ipBlock": {"cidr": "169.254.128.0/17"}}]}]),
    ],
)
def test_a_block_inside_a_denied_one_is_refused_by_its_place(setting: str, value: list[Any]) -> None:
    section, name = setting.split(".")
    with pytest.raises(helm_python.HelmRenderError, match=rf"networkPolicy\.{setting}: .* lies in .*deniedCidrs"):
        render({"networkPolicy": {section: {name: value}}})


def test_a_rule_that_would_open_everything_is_refused() -> None:
    for rule in ({"ports": [{"protocol": "TCP", "port": 80}]}, {"to": []}):
        with pytest.raises(helm_python.HelmValuesError, match="extraEgress/0"):
            render({"networkPolicy": {"trainer": {"extraEgress": [rule]}}})


def test_a_dns_server_may_lie_in_a_denied_block_for_its_port_is_all_that_opens() -> None:
    for policy in policies():
        assert allows(policy, "egress", 53, {"ip": "169.254.20.10"}, "UDP")
        assert not allows(policy, "egress", 80, {"ip": "169.254.20.10"})
    wide = {"networkPolicy": {"dns": {"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}}}
    for policy in policies(wide):
        assert allows(policy, "egress", 53, {"ip": "8.8.8.8"}, "UDP")
        assert not allows(policy, "egress", 53, {"ip": "169.254.169.254"}, "UDP")


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


def test_the_ports_of_a_job_are_open_to_its_own_pods_alone() -> None:
    """torchrun's rendezvous asks nobody: what the chart's policy and the operator's for a job let in together."""
    _, trainers = policies()
    job = torchrun.network_policy("nli", {"namespace": NAMESPACE})
    job["spec"]["policyTypes"].append("Egress")  # as `allows` wants it
    for labels, is_let_in in ((TRAINER, True), ({"finetune.dev/job": "nli2"}, False), ({"app": "database"}, False)):
        peer = {"namespace": NAMESPACE, "labels": labels}
        assert any(allows(policy, "ingress", 29500, peer) for policy in (trainers, job)) is is_let_in
        assert not allows(trainers, "ingress", 9400, peer)
    assert selects(job["spec"]["podSelector"], TRAINER)
    assert not selects(job["spec"]["podSelector"], {"finetune.dev/job": "nli2"})
    assert not allows(job, "ingress", 29500, {"namespace": "elsewhere", "labels": TRAINER})


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
