"""kube-linter's default checks (v0.8.3) as far as they concern the chart's kinds. CI runs kube-linter itself."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.docs.chart import VALUES_FILES, objects, values_of

Object = dict[str, Any]
#: What the administrator has asked for with these values.
ASKED_FOR = {"everything": {"pdb-max-unavailable"}, "smallest": {"non-existent-service-account"}}
_UNTAGGED = (r".*:(latest)$", r"^[^:]*$", r"(.*/[^:]+)$")
_IGNORE = "ignore-check.kube-linter.io/"


def pod_of(obj: Object) -> Object | None:
    if obj["kind"] == "Pod":
        return obj
    return obj["spec"].get("template") if obj["kind"] in ("Deployment", "Job", "DaemonSet", "StatefulSet") else None


def of_containers(pod: Object) -> Iterator[str]:
    for container in [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]:
        security = {**pod["spec"].get("securityContext", {}), **container.get("securityContext", {})}
        resources, env = container.get("resources", {}), container.get("env", [])
        names, ports = [each["name"] for each in env], [each["containerPort"] for each in container.get("ports", [])]
        known = {*ports, *(each["name"] for each in container.get("ports", []))}
        probes = {
            kind: probe[how]["port"]
            for kind in ("liveness", "readiness", "startup")
            if (probe := container.get(f"{kind}Probe"))
            for how in ("httpGet", "tcpSocket")
            if how in probe
        }
        yield from (f"{kind}-port" for kind, port in probes.items() if port not in known)
        found = {
            "duplicate-env-var": len(names) != len(set(names)),
            "env-var-secret": any("secret" in each["name"].lower() and each.get("value") for each in env),
            "latest-tag": any(re.search(pattern, container["image"]) for pattern in _UNTAGGED),
            "no-read-only-root-fs": not security.get("readOnlyRootFilesystem"),
            "drop-net-raw-capability": not {"ALL", "NET_RAW"} & {*security.get("capabilities", {}).get("drop", [])},
            "privilege-escalation-container": security.get("allowPrivilegeEscalation") is not False,
            "privileged-container": bool(security.get("privileged")),
            "run-as-non-root": not security.get("runAsNonRoot") and not security.get("runAsUser"),
            "ssh-port": 22 in ports,
            "unset-cpu-requirements": not resources.get("requests", {}).get("cpu"),
            "unset-memory-requirements": not resources.get("limits", {}).get("memory"),
        }
        yield from (check for check, is_broken in found.items() if is_broken)


def of_pod(obj: Object, everything: list[Object]) -> Iterator[str]:
    if (pod := pod_of(obj)) is None:
        return
    spec, namespace = pod["spec"], obj["metadata"].get("namespace")
    yield from of_containers(pod)
    yield from (f"host-{what}" for what in ("IPC", "Network", "PID") if spec.get(f"host{what}"))
    accounts = [o["metadata"]["name"] for o in everything
                if o["kind"] == "ServiceAccount" and o["metadata"]["namespace"] == namespace]  # fmt: skip
    found = {
        "sensitive-host-mounts": any("hostPath" in volume for volume in spec.get("volumes", [])),
        "unsafe-sysctls": bool(spec.get("securityContext", {}).get("sysctls")),
        "deprecated-service-account-field": "serviceAccount" in spec,
        "non-existent-service-account": spec.get("serviceAccountName", "default") not in ["default", *accounts],
        "no-anti-affinity": obj["spec"].get("replicas", 1) > 1 and "podAntiAffinity" not in spec.get("affinity", {}),
        "job-ttl-seconds-after-finished": obj["kind"] == "Job" and "ttlSecondsAfterFinished" not in obj["spec"],
    }
    if obj["kind"] == "Deployment":
        wanted = obj["spec"]["selector"]["matchLabels"].items()
        found["mismatching-selector"] = not wanted <= pod["metadata"]["labels"].items()
    yield from (check for check, is_broken in found.items() if is_broken)


def of_service(obj: Object, everything: list[Object]) -> Iterator[str]:
    if obj["kind"] != "Service":
        return
    pods = [pod for each in everything if (pod := pod_of(each)) and each["kind"] != "Pod"]
    chosen = [pod for pod in pods if obj["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
    if not chosen:
        yield "dangling-service"
    ports = {port["name"] for pod in chosen for each in pod["spec"]["containers"] for port in each.get("ports", [])}
    if not {port["targetPort"] for port in obj["spec"]["ports"]} <= ports:
        yield "invalid-target-ports"


def of_budget(obj: Object, everything: list[Object]) -> Iterator[str]:
    if obj["kind"] == "PodDisruptionBudget":
        if obj["spec"].get("maxUnavailable") in (0, "0%"):
            yield "pdb-max-unavailable"
        if "minAvailable" in obj["spec"]:  # every Deployment here has one replica
            yield "pdb-min-available"
        if "unhealthyPodEvictionPolicy" not in obj["spec"]:
            yield "pdb-unhealthy-pod-eviction-policy"


def of_version(obj: Object, everything: list[Object]) -> Iterator[str]:
    if obj["apiVersion"].startswith("extensions/v1beta"):
        yield "no-extensions-v1beta"


CHECKS: tuple[Callable[[Object, list[Object]], Iterator[str]], ...] = (
    of_pod,
    of_service,
    of_budget,
    of_version,
)


def findings(found: list[Object]) -> set[str]:
    """The checks that fail, those left out that an object's annotations name."""
    return {
        finding
        for obj in found
        for check in CHECKS
        for finding in check(obj, found)
        if f"{_IGNORE}{finding}" not in (obj["metadata"].get("annotations") or {})
    }


@pytest.mark.parametrize("name", VALUES_FILES)
def test_the_chart_is_clean(name: str) -> None:
    assert findings(objects(values_of(name))) == ASKED_FOR.get(name, set())


def test_a_careless_deployment_would_be_found() -> None:
    pod = {
        "metadata": {"labels": {"app": "a"}},
        "spec": {
            "hostNetwork": True,
            "serviceAccountName": "none",
            "volumes": [{"name": "docker", "hostPath": {"path": "/var/run/docker.sock"}}],
            "containers": [
                {
                    "name": "a",
                    "image": "team/a:latest",
                    "env": [{"name": "MY_SECRET", "value": "x"}] * 2,
                    "livenessProbe": {"httpGet": {"port": "http"}},
                    "ports": [{"name": "ssh", "containerPort": 22}],
                }
            ],
        },
    }
    spec = {"replicas": 2, "selector": {"matchLabels": {"app": "b"}}, "template": pod}
    found = findings([{"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"namespace": "n"}, "spec": spec}])
    assert found == {
        *("host-Network", "non-existent-service-account", "sensitive-host-mounts", "latest-tag", "liveness-port"),
        *("duplicate-env-var", "env-var-secret", "mismatching-selector", "no-anti-affinity", "no-read-only-root-fs"),
        *("privilege-escalation-container", "run-as-non-root", "ssh-port", "drop-net-raw-capability"),
        *("unset-cpu-requirements", "unset-memory-requirements"),
    }
