"""What the chart renders, by values file: kept as snapshots, valid by Kubernetes' own schemas, and restricted."""

import os
import re
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from finetune_api import crd_sweep
from finetune_api.crd import crd
from support.common import kubernetes_schema
from support.docs.chart import (
    CHART,
    NAMESPACE,
    ROOT,
    VALUES_FILES,
    find,
    load_all,
    objects,
    render,
    values_of,
)

SNAPSHOTS = Path(__file__).with_name("snapshots")
Object = dict[str, Any]
EVERY_FILE = pytest.mark.parametrize("name", VALUES_FILES)
#: Kinds of the Prometheus operator, whose schemas Kubernetes does not carry: the fields its v1 API has that we use.
MONITORING_FIELDS = {
    "ServiceMonitor": {
        "jobLabel": "",
        "selector": {"matchLabels": ...},
        "namespaceSelector": {"any": "", "matchNames": [""]},
        "endpoints": [{"port": "", "path": "", "interval": "", "honorLabels": ""}],
    },
    "PodMonitor": {
        "selector": {"matchExpressions": [{"key": "", "operator": ""}]},
        "namespaceSelector": {"any": "", "matchNames": [""]},
        "podMetricsEndpoints": [
            {
                "port": "",
                "path": "",
                "interval": "",
                "relabelings": [{"action": "", "sourceLabels": [""], "regex": "", "targetLabel": ""}],
            }
        ],
    },
    "PrometheusRule": {
        "groups": [{"name": "", "rules": [{"alert": "", "expr": "", "for": "", "labels": ..., "annotations": ...}]}]
    },
}


@EVERY_FILE
def test_helm_lint_finds_nothing(name: str) -> None:
    report = helm_python.lint(CHART, values_of(name), strict=True, namespace=NAMESPACE)
    said = [message for message in report["messages"] if message["error"] != "icon is recommended"]
    assert (said, report["errors"]) == ([], [])


@EVERY_FILE
def test_rendered_objects_match_the_snapshot(name: str) -> None:
    rendered = {path: text for path, text in render(values_of(name)).items() if not _is_copied(path)}
    text = "\n".join(f"# Source: {path}\n{body.strip()}\n" for path, body in rendered.items())
    snapshot = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        snapshot.write_text(text)
    assert text == snapshot.read_text(), "if the change is meant: UPDATE_SNAPSHOTS=1 pytest tests/chart/test_render.py"


def _is_copied(path: str) -> bool:
    """Templates that only wrap a file of the chart, which other tests read."""
    return path.endswith(("crd.yaml", "dashboards.yaml", "prometheusrule.yaml"))


def test_no_snapshot_is_left_over() -> None:
    assert {path.stem for path in SNAPSHOTS.glob("*.txt")} == set(VALUES_FILES)


@EVERY_FILE
@pytest.mark.parametrize("version", ["1.30", "1.36"])
def test_every_object_is_valid_strictly(name: str, version: str) -> None:
    for obj in objects(values_of(name)):
        if obj["kind"] in MONITORING_FIELDS:
            assert obj["apiVersion"] == "monitoring.coreos.com/v1"
            _only_known_fields(obj["spec"], MONITORING_FIELDS[obj["kind"]], obj["kind"])
        else:
            kubernetes_schema.check(obj, version)


def _only_known_fields(value: Any, known: Any, where: str) -> None:
    if known is ...:
        assert all(isinstance(item, str) for item in value.values()), where
    elif isinstance(known, dict):
        for key, child in value.items():
            assert key in known, f"{where}.{key}"
            _only_known_fields(child, known[key], f"{where}.{key}")
    elif isinstance(known, list):
        for child in value:
            _only_known_fields(child, known[0], f"{where}[]")
    else:
        assert not isinstance(value, dict | list), where


@EVERY_FILE
def test_names_are_unique_and_namespaces_explicit(name: str) -> None:
    found = objects(values_of(name))
    keys = [(o["apiVersion"], o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"]) for o in found]
    assert len(keys) == len(set(keys))
    cluster_wide = {"CustomResourceDefinition", "ClusterRole", "ClusterRoleBinding", "PriorityClass"}
    cluster_wide |= {"ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"}
    assert {kind for _, kind, namespace, _ in keys if namespace is None} <= cluster_wide


@EVERY_FILE
def test_every_pod_meets_the_restricted_standard_with_a_read_only_root(name: str) -> None:
    templates = [o["spec"]["template"] for o in objects(values_of(name)) if o["kind"] == "Deployment"]
    templates += [o for o in objects(values_of(name)) if o["kind"] == "Pod"]
    assert templates
    for pod in (template["spec"] for template in templates):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
        assert not any("hostPath" in volume for volume in pod.get("volumes", []))
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


def test_the_copy_of_the_definition_in_the_chart_is_current() -> None:
    for original in (ROOT / "crds").glob("*.yaml"):
        assert (CHART / "files" / original.name).read_text() == original.read_text(), "stale: run make crds"


def test_the_definition_is_the_models_and_stays_when_the_chart_goes() -> None:
    definitions = {each["metadata"]["name"]: each for each in _definitions()}
    made = {each["metadata"]["name"]: each for each in (crd(), crd_sweep.crd())}
    assert definitions.keys() == made.keys()
    for name, definition in definitions.items():
        assert definition["spec"] == yaml.safe_load(yaml.safe_dump(made[name]["spec"]))
        assert definition["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    leaving = _definitions({"crds": {"keep": False}})
    assert leaving and not any("annotations" in each["metadata"] for each in leaving)
    assert not _definitions({"crds": {"enabled": False}})


def _definitions(values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [each for each in objects(values or {}) if each["kind"] == "CustomResourceDefinition"]


@pytest.mark.parametrize("watch", [{}, {"namespaces": ["research", "products"]}, {"allNamespaces": True}])
@pytest.mark.parametrize("buckets", [["datasets", "adapters"], ["one-bucket"], ["first", "between", "last"]])
def test_notes_name_the_next_command_and_a_job_that_finds_all_it_names(watch: Object, buckets: list[str]) -> None:
    from finetune_api import manifest, uri

    values = {"watch": watch, "demo": {"s3": {"enabled": True, "buckets": buckets}}}
    notes = render(values)["templates/NOTES.txt"]
    assert f"helm test tune --namespace {NAMESPACE}" in notes
    (namespace,) = re.findall(r"kubectl apply --namespace (\S+)", notes)
    text = notes.split("<<EOF\n", 1)[1].split("EOF", 1)[0]
    job = manifest.load_text(text, "NOTES.txt")
    assert {uri.parse(place).authority for place in (job.spec.dataset.train, job.spec.output.uri)} <= set(buckets)
    secrets = {(o["metadata"]["namespace"], o["metadata"]["name"]) for o in objects(values) if o["kind"] == "Secret"}
    for reference in (job.spec.dataset.secret_ref, job.spec.output.secret_ref):
        assert reference is not None
        assert (namespace, reference.name) in secrets


def test_two_ways_to_say_which_namespaces_is_refused() -> None:
    with pytest.raises(helm_python.HelmRenderError, match=r"watch\.namespaces must be empty"):
        render({"watch": {"allNamespaces": True, "namespaces": ["research"]}})


def test_the_operator_is_one_and_the_old_one_ends_first() -> None:
    deployment = find(objects(), "Deployment")
    assert (deployment["spec"]["replicas"], deployment["spec"]["strategy"]) == (1, {"type": "Recreate"})
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {container[probe]["httpGet"]["port"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")} == {
        "http"
    }


def test_a_digest_wins_over_a_tag() -> None:
    deployment = find(objects(values_of("everything")), "Deployment", "tuner")
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"].startswith(
        "registry.example.com/ml/operator@sha256:0123"
    )


def test_nothing_but_the_operators_rights_grows_with_the_namespaces() -> None:
    found = objects({"watch": {"namespaces": ["research", "products"]}})
    roles = {(o["kind"], o["metadata"]["namespace"]) for o in found if o["kind"] in {"Role", "RoleBinding"}}
    assert roles == {(kind, place) for kind in ("Role", "RoleBinding") for place in ("research", "products")}
    (a, b) = [o["rules"] for o in found if o["kind"] == "Role"]
    assert a == b
    wide = objects({"watch": {"allNamespaces": True}})
    assert find(wide, "ClusterRole", "tune-finetune-operator")["rules"] == a
    assert not [o for o in wide if o["kind"] == "Role"]


@EVERY_FILE
def test_no_role_reads_secrets_or_uses_wildcards(name: str) -> None:
    roles = [o for o in objects(values_of(name)) if o["kind"] in {"Role", "ClusterRole"}]
    for rule in (rule for role in roles for rule in role["rules"]):
        assert not {"secrets", "*"} & set(rule["resources"])
        assert "*" not in rule["verbs"]
        assert "*" not in rule["apiGroups"]


def test_documents_with_a_key_given_twice_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="given twice"):
        load_all("a: 1\na: 2\n")
