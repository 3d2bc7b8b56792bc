"""What is offered next fits what was done, and names the same cluster and namespace."""

import re
from pathlib import Path

import pytest

from finetune_api import exit_codes
from finetune_cli.errors import same_place
from finetune_cli.output.job_view import View
from finetune_cli.output.next_steps import after_export, after_job
from support.simulation import job_states as states

PLACE = same_place("team", "lab", Path("k.yaml"))


@pytest.mark.parametrize(
    ("status", "commands"),
    [
        (states.succeeded("s3://a/nli"), [f"finetune chat nli{PLACE}", f"finetune download nli ./nli{PLACE}"]),
        (states.succeeded("pvc://models/nli"), []),
        (states.kept_back("s3://a/c"), ["finetune chat s3://a/c", "finetune promote s3://a/c"]),
        (states.training(), [f"finetune watch nli{PLACE}", f"finetune logs -f nli{PLACE}"]),
        (states.waiting("no node"), [f"finetune watch nli{PLACE}"]),
        ({}, [f"finetune watch nli{PLACE}"]),
    ],
)
def test_after_a_job(status, commands):
    assert PLACE == " -n team --context lab --kubeconfig k.yaml"
    assert after_job(View.of(states.job("nli") | {"status": status}), PLACE) == commands


@pytest.mark.parametrize(
    ("kind", "uri", "commands"),
    [
        ("merged", "file:///m", ["vllm serve /m"]),
        ("gguf", "file:///m", ["ollama create my-model -f /m/Modelfile"]),
        ("merged", "s3://a/m", ["finetune download s3://a/m ./merged"]),
        ("oci", "oci://r/a:1", []),
    ],
)
def test_after_an_export(kind, uri, commands):
    assert after_export(kind, uri) == commands


@pytest.mark.parametrize("outcome", exit_codes.REASONS.values(), ids=lambda outcome: outcome.reason)
def test_a_run_without_a_cluster_gets_no_advice_about_one(outcome):
    if outcome.reason in ("OOMKilled", "StorageLimitExceeded"):  # told by the kubelet alone
        return
    advice = outcome.cure_here or outcome.cure
    assert not re.search("Secret|retried|attempt|NetworkPolic|create the job|node", advice), advice
