"""Objects that nest deeper than any parser goes, stored before the schema knew a bound: they cost no other job.

The CRD is loosened for a while, for today's refuses such an object at once.
"""

import json
from collections.abc import Iterator

import pytest
import yaml

from finetune_api import answers
from finetune_operator.core.objects import raw
from support.cli.run import finetune, no_traceback
from support.operator.fixtures import Jobs, StartOperator, manifest
from support.server.client import ApiError, Kube, path_of, wait_until
from support.server.server import CRD_FILE, Cluster

#: A little less than pydantic's parser reads, more than it reads, more than Python's reads.
LEVELS = {"shallow": 185, "deep": 230, "deeper": 1_200, "deepest": 3_000}


@pytest.fixture
def loosened(cluster: Cluster, kube: Kube) -> Iterator[None]:
    """The CRD as it was when affinity was free and a name had any length."""
    if not cluster.is_real:
        pytest.skip("the stand-in asks today's models, whatever the CRD says")
    crd = yaml.safe_load(CRD_FILE.read_text())
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    resources = schema["properties"]["spec"]["properties"]["resources"]["properties"]
    resources["affinity"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    schema["x-kubernetes-validations"] = [
        rule for rule in schema["x-kubernetes-validations"] if not rule["message"].startswith("metadata.name")
    ]
    cluster.kube.patch(crd["kind"], crd["metadata"]["name"], {"spec": {"versions": crd["spec"]["versions"]}})
    try:
        yield
    finally:
        asked(kube, "DELETE")
        cluster.apply_crds()


def asked(kube: Kube, method: str, name: str = "", body: str = "") -> bytes:
    """An answer of the API server as it is: Python's own parser would not survive it either."""
    url = kube.access.server + path_of("FineTuneJob", kube.namespace, name)
    headers = {"Content-Type": "application/json"}
    answer = kube._session.request(method, url, data=body, headers=headers, timeout=60)
    answer.raise_for_status()
    return answer.content


def create_deep(kube: Kube, name: str, levels: int) -> None:
    """Create a job with such an affinity, as soon as the server no longer prunes it."""
    deep = '{"a":' * levels + "{}" + "}" * levels

    def stored() -> bool:
        body = json.dumps(manifest(name, resources={"affinity": "here"})).replace('"here"', deep)
        if asked(kube, "POST", body=body).count(b'{"a":') == levels:
            return True
        kube.delete("FineTuneJob", name)
        return False

    wait_until(stored, "the CRD is loosened")


def accepted(kube: Kube, name: str) -> str:
    """Reason and message of the condition; empty while there is none, or another."""
    job, _ = answers.read_object(asked(kube, "GET", name))
    found = (each for each in raw.entries(job, "status", "conditions") if each["type"] == "Accepted")
    return next((f"{each['reason']}: {each['message']}" for each in found if each["status"] == "False"), "")


def test_objects_that_nest_without_end_are_refused_and_cost_no_other_job(
    loosened: None, jobs: Jobs, cluster: Cluster, start_operator: StartOperator
):
    for name, levels in LEVELS.items():
        create_deep(jobs.kube, name, levels)
    listed = no_traceback(finetune("list", "-n", str(jobs.kube.namespace), env={"KUBECONFIG": str(cluster.kubeconfig)}))
    assert listed.returncode == 0
    assert {name for name in LEVELS if name in listed.stdout} == set(LEVELS)
    assert listed.stdout.count("Unreadable") == 3
    operator = start_operator()
    jobs.create("before")
    jobs.wait("before", "Accepted", "True")
    for name in LEVELS:
        why = wait_until(lambda name=name: accepted(jobs.kube, name), f"{name} is refused")
        assert why.startswith("ConfigInvalid: spec.resources.affinity.a: unknown field")
    for name, levels in LEVELS.items():  # and while the watches are open
        create_deep(jobs.kube, f"{name}-again", levels)
        wait_until(lambda name=name: accepted(jobs.kube, f"{name}-again"), f"{name}-again is refused")
    jobs.create("after")
    jobs.wait("after", "Accepted", "True")
    assert (operator.metric("finetune_operator_unreadable_objects_total", resource="finetunejobs") or 0) >= 3
    operator.process.stop()
    start_operator()
    jobs.create("restarted")
    jobs.wait("restarted", "Accepted", "True")
    for arguments in (["list"], ["list", "-o", "json"], ["list", "-o", "yaml"], ["status", "deeper"]):
        env = {"KUBECONFIG": str(cluster.kubeconfig)}
        shown = no_traceback(finetune(*arguments, "-n", str(jobs.kube.namespace), env=env))
        assert shown.returncode == 0, shown.stderr
        assert "deeper" in shown.stdout


def test_an_older_job_with_too_long_a_name_is_refused_once_with_a_condition(
    loosened: None, jobs: Jobs, cluster: Cluster, start_operator: StartOperator
):
    name = "n" + "a" * 50
    create_deep(jobs.kube, "ready", 10)  # the CRD is loosened
    asked(jobs.kube, "DELETE", "ready")
    jobs.create(name)
    cluster.apply_crds()
    wait_until(lambda: refuses(jobs, "n" + "b" * 50), "the CRD is as it was")
    operator = start_operator()
    refused = jobs.wait(name, "Accepted", "False", "ConfigInvalid")
    assert "metadata.name" in refused["message"]
    assert "must be at most 50 lowercase letters" in refused["message"]
    operator.wait_idle()
    assert (operator.metric("finetune_operator_errors_total") or 0) == 0
    assert jobs.children(name) == []


def refuses(jobs: Jobs, name: str) -> bool:
    try:
        jobs.create(name)
    except ApiError as error:
        return "metadata.name must be at most 50" in error.message
    jobs.kube.delete("FineTuneJob", name)
    return False
