"""The alert rules: right by promtool's own reading, firing when they must and silent when they must."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from support.docs.chart import (
    CHART,
    find,
    objects,
    render,
    values_of,
)
from support.docs.prometheus import (
    by_file,
    needs_prometheus,
    promtool,
    trial_config,
)

RULES = CHART / "files" / "alerts.yaml"
CASES = Path(__file__).with_name("alerts.test.yaml")


def alerts() -> dict[str, dict]:
    return {rule["alert"]: rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}


@needs_prometheus
def test_every_alert_fires_and_keeps_quiet_as_its_cases_say(tmp_path: Path) -> None:
    for file in (RULES, CASES):
        shutil.copy(file, tmp_path)
    found = subprocess.run([promtool(), "test", "rules", tmp_path / CASES.name], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_every_alert_has_a_case_where_it_fires_and_one_where_it_does_not() -> None:
    fires: dict[bool, set[str]] = {True: set(), False: set()}
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for check in case["alert_rule_test"]:
            fires[bool(check["exp_alerts"])].add(check["alertname"])
    one_sided = {"FineTuneOperatorErrors"}  # its case has a second series, which must not fire
    assert fires[True] == set(alerts())
    assert fires[False] | one_sided == set(alerts())


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in {"critical", "warning"}, name
        assert rule["annotations"].keys() == {"summary", "description"}, name
        assert len(rule["annotations"]["description"]) > 80, name


@needs_prometheus
@pytest.mark.parametrize("name", ["monitoring", "everything"])
def test_the_rendered_rules_are_valid(name: str, tmp_path: Path) -> None:
    rule = find(objects(values_of(name)), "PrometheusRule")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rule["spec"]))
    found = subprocess.run([promtool(), "check", "rules", tmp_path / "rules.yaml"], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_the_rendered_rules_are_the_file_less_what_is_switched_off_plus_labels() -> None:
    plain = find(objects(values_of("monitoring")), "PrometheusRule")
    assert plain["spec"] == yaml.safe_load(RULES.read_text())
    changed = find(objects(values_of("everything")), "PrometheusRule")
    rules = {rule["alert"]: rule for group in changed["spec"]["groups"] for rule in group["rules"]}
    assert set(alerts()) - set(rules) == {"FineTuneJobStalled"}
    assert all(rule["labels"]["team"] == "ml-platform" for rule in rules.values())
    assert {name: rule["expr"] for name, rule in rules.items()}.items() <= {
        name: rule["expr"] for name, rule in alerts().items()
    }.items()


@needs_prometheus
@pytest.mark.parametrize("name", ["demo", "cluster-wide"])
def test_the_trials_prometheus_takes_its_configuration_and_rules(name: str, tmp_path: Path) -> None:
    config, rules = trial_config(objects(values_of(name)))
    for scrape in config["scrape_configs"]:
        (discovery,) = scrape["kubernetes_sd_configs"]
        assert discovery["role"] == "pod"
        assert discovery.keys() <= {"role", "namespaces"}
    (tmp_path / "alerts.yml").write_text(rules)
    by_file(config, tmp_path)  # Debian's Prometheus is built without discovery through Kubernetes
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [promtool(), "check", "config", tmp_path / "prometheus.yml"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    assert yaml.safe_load(rules) == yaml.safe_load(RULES.read_text())


def test_the_monitors_give_the_labels_that_rules_and_dashboards_use() -> None:
    found = objects(values_of("monitoring"))
    assert find(found, "ServiceMonitor")["spec"]["jobLabel"] == "app.kubernetes.io/part-of"
    service = find(found, "Service")
    assert service["metadata"]["labels"]["app.kubernetes.io/part-of"] == "finetune-operator"
    (endpoint,) = find(found, "PodMonitor")["spec"]["podMetricsEndpoints"]
    added = {relabeling["targetLabel"] for relabeling in endpoint["relabelings"] if "targetLabel" in relabeling}
    assert added == {"finetunejob", "attempt"}
    demo = render(values_of("demo"))["templates/demo/prometheus-config.yaml"]
    assert "job_name: finetune-operator" in demo
    assert all(f"target_label: {label}" in demo for label in ("namespace", "pod", "finetunejob", "attempt"))


INDEX = "__meta_kubernetes_pod_label_batch_kubernetes_io_job_completion_index"


def test_of_a_jobs_pods_only_the_one_that_serves_metrics_is_scraped() -> None:
    (endpoint,) = find(objects(values_of("monitoring")), "PodMonitor")["spec"]["podMetricsEndpoints"]
    config, _ = trial_config(objects(values_of("demo")))
    trainers = next(scrape for scrape in config["scrape_configs"] if scrape["job_name"] == "finetune-trainer")
    (monitor,) = [rule["regex"] for rule in endpoint["relabelings"] if rule.get("sourceLabels") == [INDEX]]
    (trial,) = [rule["regex"] for rule in trainers["relabel_configs"] if rule.get("source_labels") == [INDEX]]
    for pattern in (monitor, trial):  # Prometheus anchors it
        assert [index for index in ("", "0", "1", "10", "00") if re.fullmatch(str(pattern), index)] == ["", "0"]
