"""What the chart renders, by values file: kept as snapshots, valid by Kubernetes' own schemas, and restricted."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml

from finetune_api.crd import crd
from support.chart import CHART, NAMESPACE, ROOT, VALUES_FILES, find, load_all, objects, render, values_of

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
            kubernetes_validate.validate(obj, version, strict=True)


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
    copy = CHART / "files" / "finetunejobs.yaml"
    assert copy.read_text() == (ROOT / "crds" / "finetunejobs.yaml").read_text(), "stale: run make crds"


def test_the_definition_is_the_models_and_stays_when_the_chart_goes() -> None:
    definition = find(objects(), "CustomResourceDefinition")
    assert definition["spec"] == yaml.safe_load(yaml.safe_dump(crd()["spec"]))
    assert definition["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    leaving = find(objects({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert "annotations" not in leaving["metadata"]
    assert not [o for o in objects({"crds": {"enabled": False}}) if o["kind"] == "CustomResourceDefinition"]


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


def test_helm_test_is_there_where_its_service_is() -> None:
    cases = [
        {},
        {"metrics": {"service": {"enabled": False}}},
        {"metrics": {"service": {"enabled": False}, "serviceMonitor": {"enabled": True}}},
        {"tests": {"enabled": False}},
    ]
    for values, there in zip(cases, (True, False, True, False), strict=True):
        found = objects(values)
        pods = [o for o in found if o["kind"] == "Pod"]
        assert bool(pods) is there
        assert ("helm test tune" in render(values)["templates/NOTES.txt"]) is there
        for pod in pods:
            (service,) = [o["metadata"]["name"] for o in found if o["kind"] == "Service"]
            assert pod["spec"]["containers"][0]["args"][-1] == f"http://{service}.{NAMESPACE}.svc:8080"
    assert "kubectl rollout status deployment/tune-finetune-operator" in render(cases[1])["templates/NOTES.txt"]


PLACEMENT = {
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
}


def test_every_pod_of_the_release_is_placed_and_pulled_alike() -> None:
    found = objects({**values_of("demo"), **PLACEMENT})
    pods = [o["spec"]["template"] for o in found if o["kind"] == "Deployment"] + [
        o for o in found if o["kind"] == "Pod"
    ]
    assert len(pods) == 4
    for pod in pods:
        assert {key: pod["spec"][key] for key in PLACEMENT} == PLACEMENT


def test_a_label_given_twice_is_given_once() -> None:
    mine = {"team": "ml", "tier": "common"}
    values = {
        "commonLabels": mine,
        "podLabels": {"tier": "pod"},
        "metrics": {
            "serviceMonitor": {"enabled": True, "labels": {"tier": "monitor"}},
            "dashboards": {"enabled": True, "label": "tier", "labelValue": "board"},
        },
    }
    found = objects(values)  # whose loader refuses a key given twice
    deployment = find(found, "Deployment")
    labels = {
        "common": deployment["metadata"]["labels"],
        "pod": deployment["spec"]["template"]["metadata"]["labels"],
        "monitor": find(found, "ServiceMonitor")["metadata"]["labels"],
        "board": find(found, "ConfigMap", "tune-finetune-operator-dashboard-job")["metadata"]["labels"],
    }
    assert {name: (each["team"], each["tier"]) for name, each in labels.items()} == {
        name: ("ml", name) for name in labels
    }


@pytest.mark.parametrize("setting", ["commonLabels", "podLabels"])
@pytest.mark.parametrize("key", ["app.kubernetes.io/name", "app.kubernetes.io/component", "helm.sh/chart"])
def test_a_label_that_is_the_charts_own_is_refused(setting: str, key: str) -> None:
    with pytest.raises(helm_python.HelmRenderError, match=f"the label {re.escape(key)} is set by the chart"):
        render({setting: {key: "mine"}})


def test_the_same_release_in_two_namespaces_shares_no_object_but_the_definition() -> None:
    for name in ("defaults", "demo", "monitoring"):
        here, there = (
            {
                (o["kind"], o["metadata"].get("namespace"), o["metadata"]["name"])
                for o in objects(values_of(name), place)
            }
            for place in ("a", "b")
        )
        assert {kind for kind, _, _ in here & there} == {"CustomResourceDefinition"}


def test_one_registry_holds_both_images() -> None:
    def images(image: Object, trainer: Object | None = None) -> tuple[str, str]:
        (container,) = find(objects({"image": image, "trainer": {"image": trainer or {}}}), "Deployment")["spec"][
            "template"
        ]["spec"]["containers"]
        env = {variable["name"]: variable["value"] for variable in container["env"]}
        return container["image"], env["FINETUNE_OPERATOR_TRAINER_IMAGE"]

    assert images({}) == ("finetune-operator:0.1.0", "finetune-trainer:0.1.0")
    assert images({"registry": "registry.example.com/team"}) == (
        "registry.example.com/team/finetune-operator:0.1.0",
        "registry.example.com/team/finetune-trainer:0.1.0",
    )
    whole = {"repository": "registry.example.com/a/operator", "tag": "2"}
    assert images(whole, {"repository": "other.example.com/t"}) == (
        "registry.example.com/a/operator:2",
        "other.example.com/t:0.1.0",
    )


def checksum(values: Object, name: str) -> str:
    template = find(objects(values), "Deployment", f"tune-finetune-operator-{name}")["spec"]["template"]
    (value,) = [text for key, text in template["metadata"]["annotations"].items() if key.startswith("checksum/")]
    return value


def test_the_trials_prometheus_restarts_when_anything_of_its_configuration_changes() -> None:
    same = checksum(values_of("demo"), "demo-prometheus")
    scraped = {**values_of("demo"), "watch": {"namespaces": ["research"]}}
    alerts = {**values_of("demo"), "metrics": {"prometheusRule": {"disabledAlerts": ["FineTuneJobStalled"]}}}
    assert len({same, checksum(scraped, "demo-prometheus"), checksum(alerts, "demo-prometheus")}) == 3
    assert checksum({**values_of("demo"), "podLabels": {"a": "b"}}, "demo-prometheus") == same


def test_the_trials_store_restarts_when_its_program_changes() -> None:
    program = (CHART / "files" / "demo-s3.py").read_bytes()
    assert checksum(values_of("demo"), "demo-s3") == hashlib.sha256(program).hexdigest()


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
