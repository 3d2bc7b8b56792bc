"""The chart's settings reach the operator: its environment, read by the operator's own Settings."""

import os
from typing import Any

import pytest

from finetune_operator.settings import Settings
from support.docs.chart import (
    NAMESPACE,
    find,
    objects,
    values_of,
)

PREFIX = "FINETUNE_OPERATOR_"
#: What the chart decides or leaves to its default: the address, and what only makes sense outside a cluster.
FIXED = {"http_host", "http_port", "allow_file_output"}


def environment(values: dict[str, Any] | None = None, name: str | None = None) -> dict[str, str]:
    """The variables of the operator's container, as the kubelet would set them."""
    found = objects(values)
    deployment = find(found, "Deployment", name) if name else find(found, "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert all(isinstance(variable["value"], str) for variable in container["env"])
    return {variable["name"]: variable["value"] for variable in container["env"]}


def settings_of(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> Settings:
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    return Settings()


def test_the_chart_sets_no_variable_that_the_operator_does_not_know() -> None:
    known = {PREFIX + field.upper() for field in Settings.model_fields}
    for values, name in ((None, None), (values_of("everything"), "tuner")):
        ours = {variable for variable in environment(values, name) if variable.startswith(PREFIX)}
        assert ours <= known


def test_every_setting_of_the_operator_can_be_set_through_the_chart(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = settings_of(monkeypatch, environment(values_of("everything"), "tuner")).model_dump()
    defaults = Settings.model_construct().model_dump()
    assert {field for field in changed if changed[field] == defaults[field]} == FIXED


def test_the_charts_defaults_are_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_of(monkeypatch, environment()).model_dump()
    defaults = Settings.model_construct().model_dump()
    different = {field for field in found if found[field] != defaults[field]}
    assert different <= {"namespaces", "isolated_namespaces", "trainer_image"}
    assert found["isolated_namespaces"] == (NAMESPACE,)  # the chart's NetworkPolicy for trainers is there
    assert found["namespaces"] == (NAMESPACE,)
    assert found["trainer_image"] == "finetune-trainer:0.1.0"  # what `make images` makes; the chart always names it


def test_values_arrive_as_they_were_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    found = settings_of(monkeypatch, environment(values_of("everything"), "tuner"))
    assert found.namespaces == ("research", "products")
    assert found.run_as_user is None
    assert found.max_gpus_per_job == 8
    assert found.max_gpus_per_job_by_namespace == {"research": 16, "products": 0}
    assert found.allowed_images == ("registry.example.com/ml/trainer:*",)
    assert found.tolerations == ({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},)
    assert found.trainer_env == {"NCCL_DEBUG": "INFO", "HTTPS_PROXY": "http://proxy.example.com:3128"}
    assert found.trainer_image == f"registry.example.com/ml/trainer@sha256:{'fedcba9876543210' * 4}"


def test_an_operator_for_every_namespace_is_told_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings_of(monkeypatch, environment(values_of("cluster-wide"), "tune-finetune-operator")).namespaces == ()


def test_no_gpus_at_all_is_a_limit_and_not_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    none = settings_of(monkeypatch, environment({"policy": {"maxGpusPerJob": 0}}))
    unlimited = settings_of(monkeypatch, environment())
    assert (none.max_gpus_per_job, unlimited.max_gpus_per_job) == (0, None)


def test_jobs_are_isolated_only_where_the_charts_policy_lets_the_operator_in(monkeypatch: pytest.MonkeyPatch) -> None:
    off: dict[str, Any] = {"enabled": False}
    everywhere: dict[str, Any] = {"watch": {"allNamespaces": True}}
    assert settings_of(monkeypatch, environment({"networkPolicy": off})).isolated_namespaces == ()
    assert settings_of(monkeypatch, environment(everywhere)).isolated_namespaces == ()
    named = {**everywhere, "networkPolicy": {"trainer": {"namespaces": ["research"]}}}
    assert settings_of(monkeypatch, environment(named)).isolated_namespaces == ("research",)
