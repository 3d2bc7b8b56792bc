"""A job that nobody picks up: the sentence says which namespaces the operator watches, or whom to ask."""

import time

import pytest
import yaml

from finetune_cli.commands import watch
from finetune_cli.kube import operators
from finetune_cli.kube.connect import connect
from finetune_cli.kube.operators import Lookout, Operator, why_unseen
from finetune_cli.output.job_view import View
from support.docs import chart
from support.simulation import job_states as states


def _deployment(*namespaces, ready=1, home="finetune", **values):
    found = chart.find(chart.objects({"watch": {"namespaces": list(namespaces)}, **values}, home), "Deployment")
    return found | {"status": {"readyReplicas": ready}}


def _operator(*namespaces, **changes):
    return Operator.of(_deployment(*namespaces, **changes))


@pytest.mark.parametrize(
    ("found", "says"),
    [
        ([("ml", "nlp")], "the operator watches: ml, nlp; not team. Submit the job there, or ask for team in"),
        ([("ml",), ("nlp",)], "the operator watches: ml, nlp; not team"),
        ([[f"n{each:02}" for each in range(20)]], "n07 and 12 more; not team"),
        ([("ml",), ("team",)], "watches team and is up; its log may say why: kubectl logs -n "),
    ],
)
def test_the_namespaces_that_the_operator_watches_are_named(found, says):
    assert says in why_unseen([_operator(*names) for names in found], "team", everywhere=True)


def test_an_operator_that_is_not_up_is_named():
    said = why_unseen([_operator("team", ready=0)], "team", everywhere=True)
    assert "watches team, but it is not up: kubectl describe -n finetune deployment/" in said
    assert "and is up" in why_unseen([_operator("team", ready=0), _operator("team")], "team", everywhere=True)


def test_an_operator_of_the_whole_cluster_watches_every_namespace():
    found = Operator.of(chart.find(chart.objects({"watch": {"allNamespaces": True}}), "Deployment"))
    assert found.watches("anything")
    assert not found.is_ready


def test_without_an_operator_or_the_right_to_see_it():
    assert "no operator is installed in this cluster" in why_unseen([], "team", everywhere=True)
    said = why_unseen([], "team", everywhere=False)
    assert "ask its administrator whether team is in watch.namespaces of its chart" in said


@pytest.fixture
def of_the_cluster(cluster, namespace):
    return connect(namespace, None, cluster.kubeconfig)


def _old(namespace):
    metadata = {"name": "nli", "namespace": namespace, "creationTimestamp": states.ago(minutes=1)}
    return states.job("nli") | {"metadata": metadata}


def test_the_clusters_own_answer(of_the_cluster, kube, namespace):
    kube.create(_deployment("ml", home=namespace, nameOverride="ours") | {"status": {}})
    old, lookout = _old(namespace), Lookout(of_the_cluster)
    said = View.of(old, lookout.reason(old)).why
    assert said.startswith("The operator has not seen this job yet: the operator watches: ")
    assert "ml" in said.partition("; not ")[0]
    assert f"; not {namespace}." in said
    assert lookout.reason(old | {"metadata": old["metadata"] | {"creationTimestamp": states.ago()}}) == ""
    assert lookout.reason(old | {"status": states.training()}) == ""


def test_who_may_not_read_deployments_learns_whom_to_ask(cluster, kube, namespace, tmp_path):
    if not cluster.is_real:
        pytest.skip("the stand-in has no RBAC")
    kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "guest"}})
    (tmp_path / "config").write_text(yaml.safe_dump(cluster.access_of_service_account(namespace, "guest").kubeconfig()))
    guest = Lookout(connect(namespace, None, tmp_path / "config"))
    assert "is not yours to read: ask its administrator" in guest.reason(_old(namespace))
    rule = {"apiGroups": ["apps"], "resources": ["deployments"], "verbs": ["list"]}
    meta = {"metadata": {"name": "reader"}, "apiVersion": "rbac.authorization.k8s.io/v1"}
    kube.create(meta | {"kind": "Role", "rules": [rule]})
    subject = {"kind": "ServiceAccount", "name": "guest", "namespace": namespace}
    ref = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"}
    kube.create(meta | {"kind": "RoleBinding", "roleRef": ref, "subjects": [subject]})
    kube.create(_deployment(namespace, home=namespace) | {"status": {}})
    for _ in range(50):  # the API server learns of a binding a moment later
        said = Lookout(connect(namespace, None, tmp_path / "config")).reason(_old(namespace))
        if "not yours" not in said:
            break
        time.sleep(0.1)
    assert f"the operator watches {namespace}, but it is not up" in said


def test_a_watch_says_it_too(of_the_cluster, put, monkeypatch, capsys):
    monkeypatch.setattr(operators, "PICKUP_SECONDS", -1)
    put(states.job("nli"))
    with pytest.raises(watch.CliError, match="has not ended within"):
        watch.watch_job(of_the_cluster, "nli", timeout=0.5)
    assert "The operator has not seen this job yet: " in capsys.readouterr().out
