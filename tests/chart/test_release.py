"""What one release's objects have in common: labels, images, placement, names; and what restarts the trial's pods."""

import hashlib
import re
import tomllib
from typing import Any

import helm_python
import pytest
import yaml

from support.docs.chart import (
    CHART,
    NAMESPACE,
    ROOT,
    find,
    objects,
    render,
    values_of,
)

Object = dict[str, Any]


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


def test_the_version_is_pyprojects_everywhere() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (version, version)
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    tags = [
        tag for page in pages for tag in re.findall(r"finetune-(?:operator|trainer):([0-9][\w.]*)", page.read_text())
    ]
    assert tags and set(tags) == {version}
    code = [path for folder in ("crds", "operator", "cli", "trainer") for path in (ROOT / folder).rglob("*.py")]
    places = [*code, ROOT / "scripts" / "build-images.sh"]  # the Containerfiles' is held by tests/images
    assert [path for path in places if f'"{version}"' in path.read_text() or f":{version}" in path.read_text()] == []


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
