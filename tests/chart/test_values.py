"""values.yaml and values.schema.json: in step with each other, explained, and strict."""

import json
import re
from collections.abc import Iterator
from typing import Any

import helm_python
import pytest
import yaml

from support.docs.chart import (
    CHART,
    VALUES_FILES,
    render,
    values_of,
)

SCHEMA = json.loads((CHART / "values.schema.json").read_text())
VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    return SCHEMA["$defs"][reference.rsplit("/", 1)[1]] if reference else schema


def settings(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every setting the chart has of its own, as (path, schema): where Kubernetes' types begin, it ends."""
    for name, child in schema["properties"].items():
        if "properties" in child:
            yield from settings(child, f"{path}{name}.")
        elif name != "global":
            yield path + name, child


def leaves(values: Any, schema: dict[str, Any], path: str = "") -> Iterator[str]:
    for name, value in values.items():
        child = schema["properties"].get(name, {})
        if "properties" in child:
            yield from leaves(value, child, f"{path}{name}.")
        else:
            yield path + name


def test_every_setting_of_the_schema_has_a_default_and_the_other_way_round() -> None:
    assert {path for path, _ in settings(SCHEMA)} - set(leaves(VALUES, SCHEMA)) == {"affinity." + kind for kind in (
        "nodeAffinity", "podAffinity", "podAntiAffinity")}  # fmt: skip
    assert set(leaves(VALUES, SCHEMA)) <= {path for path, _ in settings(SCHEMA)}


def test_everything_yaml_sets_every_setting_away_from_its_default() -> None:
    everything = values_of("everything")

    def at(values: Any, path: str) -> Any:
        for part in path.split("."):
            values = values[part]
        return values

    switches = {"enabled", "create", "allNamespaces", "key"}
    same = {path for path in leaves(VALUES, SCHEMA) if at(everything, path) == at(VALUES, path)}
    assert {path for path in same if path.rsplit(".", 1)[-1] not in switches} == set()


def test_every_line_of_values_yaml_is_explained() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    setting = re.compile(r"^( *)(\w+):")
    bare = []
    for number, line in enumerate(lines):
        match = setting.match(line)
        if not match:
            continue
        opens_a_section = line.rstrip().endswith(":") and number + 1 < len(lines)
        inside_kubernetes_types = len(match[1]) >= 6
        if not opens_a_section and not inside_kubernetes_types and not lines[number - 1].lstrip().startswith("#"):
            bare.append(f"values.yaml:{number + 1}: {line.strip()}")
    assert bare == []


def objects_in(schema: Any, where: str = "#") -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            yield where, schema
        for key, child in schema.items():
            yield from objects_in(child, f"{where}/{key}")


def test_no_object_of_the_schema_takes_unknown_keys() -> None:
    free = {where for where, schema in objects_in(SCHEMA) if "additionalProperties" not in schema}
    affinity = "#/properties/affinity/properties/"
    assert free == {"#/properties/global"} | {affinity + k for k in ("nodeAffinity", "podAffinity", "podAntiAffinity")}
    assert all(schema["additionalProperties"] is False for _, schema in objects_in(SCHEMA) if "properties" in schema)


@pytest.mark.parametrize("name", VALUES_FILES)
def test_the_schema_takes_every_values_file(name: str) -> None:
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(values_of(name)))


@pytest.mark.parametrize("path", [path for path, _ in settings(SCHEMA)])
def test_a_typo_in_any_setting_is_refused_by_name(path: str) -> None:
    *parents, last = path.split(".")
    values: Any = "x"
    for part in reversed([*parents, last + "s0"]):
        values = {part: values}
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmValuesError, match=last + "s0"):
        chart.validate_schema(values)


REFUSED = [
    ("image: {tag: 1.0}", "/image/tag"),
    ("image: {repository: 'UPPER CASE'}", "/image/repository"),
    ("image: {digest: sha256:123}", "/image/digest"),
    ("watch: {namespaces: research}", "/watch/namespaces"),
    ("watch: {namespaces: [Research]}", "/watch/namespaces/0"),
    ("tolerations: [{key: gpu, operator: Exist}]", "/tolerations/0/operator"),
    ("tolerations: [{keys: gpu}]", "/tolerations/0"),
    ("affinity: {nodeAfinity: {}}", "/affinity"),
    ("resources: {limit: {}}", "/resources"),
    ("resources: {limits: {memory: lots}}", "/resources/limits/memory"),
    ("runAsUser: 0", "/runAsUser"),
    ("trainer: {runAsUser: 0}", "/trainer/runAsUser"),
    ("trainer: {env: {DEBUG: 1}}", "/trainer/env/DEBUG"),
    ("trainer: {terminationGracePeriodSeconds: 0}", "/trainer/terminationGracePeriodSeconds"),
    ("policy: {maxGpusPerJob: -1}", "/policy/maxGpusPerJob"),
    ("policy: {allowedS3Endpoints: ['https://s3.example.com*']}", "/policy/allowedS3Endpoints/0"),
    ("policy: {allowedHubEndpoints: ['https://huggingface.co*']}", "/policy/allowedHubEndpoints/0"),
    ("policy: {allowedImages: ['registry.example.com*/team/trainer']}", "/policy/allowedImages/0"),
    ("policy: {allowedImages: ['registry.example.com/team/trainer:']}", "/policy/allowedImages/0"),
    ("policy: {maxSharedMemory: 64 GB}", "/policy/maxSharedMemory"),
    ("trainer: {defaultMemory: lots}", "/trainer/defaultMemory"),
    ("policy: {maxGpusPerJobByNamespace: {research: many}}", "/policy/maxGpusPerJobByNamespace/research"),
    ("operator: {logLevel: verbose}", "/operator/logLevel"),
    ("operator: {workers: 0}", "/operator/workers"),
    ("podDisruptionBudget: {maxUnavailable: 2}", "/podDisruptionBudget/maxUnavailable"),
    ("networkPolicy: {deniedCidrs: [169.254.169.254]}", "/networkPolicy/deniedCidrs/0"),
    ("networkPolicy: {operator: {extraEgress: [{from: []}]}}", "/networkPolicy/operator/extraEgress/0"),
    ("metrics: {serviceMonitor: {interval: often}}", "/metrics/serviceMonitor/interval"),
    ("metrics: {prometheusRule: {disabledAlerts: FineTuneOperatorDown}}", "/metrics/prometheusRule/disabledAlerts"),
    ("demo: {s3: {buckets: []}}", "/demo/s3/buckets"),
    ("extraEnv: [{name: TOKEN, valueFrom: {secretRef: {name: a}}}]", "/extraEnv/0/valueFrom"),
]


@pytest.mark.parametrize(("text", "where"), REFUSED, ids=[text for text, _ in REFUSED])
def test_a_wrong_value_is_refused_by_its_place(text: str, where: str) -> None:
    with helm_python.Chart.load(CHART) as chart, pytest.raises(helm_python.HelmValuesError) as refusal:
        chart.validate_schema(chart.merge_values(yaml.safe_load(text)))
    assert where in str(refusal.value)


def test_patterns_of_endpoints_that_end_elsewhere_are_taken() -> None:
    patterns = ["*", "https://*", "http://127.0.0.1:*", "https://*.example.com", "https://s3.example.com/*"]
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values({"policy": {"allowedS3Endpoints": patterns}}))


def test_patterns_of_images_are_taken() -> None:
    patterns = [
        "*",
        "*/*",
        "trainer:1.*",
        "*.example.com/team/*",
        "r.example:5000/a:1",
        "r.example:*/a",
        "r.example/a@sha256:*",
    ]
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values({"policy": {"allowedImages": patterns}}))


def test_rendering_checks_the_schema_too() -> None:
    with pytest.raises(helm_python.HelmError, match="replicas"):
        render({"replicas": 3})
