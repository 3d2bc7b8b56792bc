"""Tokens of the hub and of a tracker, and S3 keys, are used by a run and show nowhere, not even while it trains."""

import base64

import pytest
import requests

from finetune_api import constants
from support.installation.installation import SECRET, Stage
from support.installation.secret_scanner import CANARIES, check_that_no_secret_shows, forms
from support.server.client import wait_until
from support.stores.hub import Hub


def test_tokens_and_keys_in_use_show_nowhere(stage: Stage, hub: Hub, tiny_model):
    # The program that the image starts, executed; in the other tests it is a fork. Libraries read addresses and keys
    # from the environment as they are imported.
    stage.node.trainers = None
    hub.add("org/base", tiny_model, token=CANARIES["HF_TOKEN"], gated=True)
    stage.secret(HF_ENDPOINT=hub.endpoint, **CANARIES)
    keys = {"secretRef": {"name": SECRET}}
    manifest = stage.manifest(
        model={"source": "hf://org/base"},
        training={"maxSteps": 40},
        logging={"wandb": {"project": "canary", **keys}},
    )
    with stage.operator(log_level="debug", trainer_env={"WANDB_MODE": "offline"}) as operator:
        stage.kube.apply(manifest)
        stage.wait_for("Training", "True")
        [pod] = stage.pods()
        served = [wait_until(lambda path=path: _served(pod, path), f"{path} is served") for path in _PATHS]
        stage.wait_for("Succeeded", "True")
        metrics = operator.get("/metrics").text
    assert "finetune_trainer_" in served[0]
    assert '"progress"' in served[1]
    assert "Metrics also go to Weights & Biases" in stage.node.all_logs()
    assert any(path.endswith("model.safetensors") for _, path in hub.requests), "the token opened the hub"
    check_that_no_secret_shows(stage, metrics, *served)


_PATHS = ("/metrics", "/progress")


def _served(pod: dict, path: str) -> str | None:
    """The page as the operator or Prometheus would get it, once it has something to tell."""
    url = f"http://{pod['status']['podIP']}:{constants.TRAINER_PORT}{path}"
    try:
        return requests.get(url, timeout=5).text
    except requests.ConnectionError:
        return None


def test_a_secret_that_shows_is_found(stage: Stage):
    stage.secret(**CANARIES)
    check_that_no_secret_shows(stage)
    copied = base64.b64encode(f"token: {CANARIES['HF_TOKEN']}".encode()).decode()
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "copy"}, "data": {"copy": copied}}
    stage.kube.create(body)
    with pytest.raises(AssertionError, match=f"{SECRET}.HF_TOKEN shows in ConfigMap"):
        check_that_no_secret_shows(stage)


def test_base64_is_found_wherever_it_begins():
    for before in ("", "a", "ab", "abc"):
        for value in ("secret", "secrets", "secretss"):
            text = base64.b64encode(f"{before}{value}and more".encode()).decode()
            assert any(form in text for form in forms(value)), (before, value)
