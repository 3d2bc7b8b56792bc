"""The small programs the chart carries, run as their pods run them: the S3 server for trials, and `helm test`."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import pytest
import requests

from finetune_api.spec import Metadata
from finetune_api.uri import parse
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.fetch import fetch
from finetune_trainer.stores.open import open_store
from support.common.processes import Process, free_port
from support.docs.chart import find, objects, values_of
from support.operator import process as operator_process
from support.server.server import Cluster


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    """The trial's object store, started with the command, arguments and file of its pod."""
    found = objects(values_of("demo"))
    (container,) = find(found, "Deployment", "tune-finetune-operator-demo-s3")["spec"]["template"]["spec"]["containers"]
    script = tmp_path / "serve.py"
    script.write_text(find(found, "ConfigMap", "tune-finetune-operator-demo-s3")["data"]["serve.py"])
    (mount,) = (m["mountPath"] for m in container["volumeMounts"] if m["name"] == "serve")
    python, path = container["command"]
    assert (python, path) == ("python3", f"{mount}/{script.name}")
    port = free_port()
    address = container["args"][0].replace("0.0.0.0:5000", f"127.0.0.1:{port}")
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    command = [sys.executable, script, address, *container["args"][1:]]
    process = Process(command, tmp_path / "s3.log", env=os.environ | env)
    try:
        process.wait_for_url(f"http://127.0.0.1:{port}{container['readinessProbe']['httpGet']['path']}")
        yield f"http://127.0.0.1:{port}"
    finally:
        assert process.stop() == 0, process.output()


def test_the_trials_store_has_its_buckets_and_takes_the_keys_of_its_secret(endpoint: str) -> None:
    secret = find(objects(values_of("demo")), "Secret", "demo-s3")["stringData"]
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=secret["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=secret["AWS_SECRET_ACCESS_KEY"],
        region_name=secret["AWS_REGION"],
    )
    assert {bucket["Name"] for bucket in client.list_buckets()["Buckets"]} == {"datasets", "adapters"}
    client.put_object(Bucket="adapters", Key="a/manifest.json", Body=b"{}", IfNoneMatch="*")
    with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
        client.put_object(Bucket="adapters", Key="a/manifest.json", Body=b"{}", IfNoneMatch="*")


@pytest.fixture
def service(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The Secret of the trial; its endpoint, the Service's name, leads to the store."""
    secret = find(objects(values_of("demo")), "Secret", "demo-s3")["stringData"]
    name, port = urlsplit(secret["AWS_ENDPOINT_URL"]).hostname, urlsplit(endpoint).port
    resolve = socket.getaddrinfo

    def cluster_dns(host: str, asked: int, *more: int, **named: int) -> list[tuple]:
        return resolve(*(("127.0.0.1", port) if host == name else (host, asked)), *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", cluster_dns)
    return secret


def test_a_request_to_the_service_by_name_finds_the_buckets(service: dict[str, str]) -> None:
    assert requests.get(f"{service['AWS_ENDPOINT_URL']}/adapters", timeout=10).status_code == 200
    assert requests.get(f"{service['AWS_ENDPOINT_URL']}/no-such-bucket", timeout=10).status_code == 404


def test_a_job_reads_and_publishes_through_the_service(endpoint: str, service: dict[str, str], tmp_path: Path) -> None:
    """What the notes say after the installation, and then what the trainer does in the pod."""
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"text": "a row"}\n' * 1000)
    keys = {"aws_access_key_id": "demo", "aws_secret_access_key": "demo", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **keys).upload_file(str(rows), "datasets", "train.jsonl")
    credentials = Credentials("output", service)
    fetched = fetch(parse("s3://datasets/train.jsonl"), credentials, tmp_path / "cache")
    assert fetched.read_bytes() == rows.read_bytes()
    store = open_store(parse("s3://adapters/quickstart"), credentials)
    job = Metadata(name="quickstart", namespace="research", uid="1")
    assert AdapterOutput(store, job).find_published() is None
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(bytes(9 << 20))
    store.upload(weights, weights.name)
    store.write_bytes("manifest.json", b"{}", if_none_match=True)
    assert [(entry.path, entry.size) for entry in store.list()] == [(weights.name, 9 << 20), ("manifest.json", 2)]


def test_the_secrets_endpoint_is_the_stores_service() -> None:
    found = objects({**values_of("demo"), "watch": {"namespaces": ["research", "products"]}})
    service = find(found, "Service", "tune-finetune-operator-demo-s3")
    secrets = [o for o in found if o["kind"] == "Secret"]
    assert {secret["metadata"]["namespace"] for secret in secrets} == {"research", "products"}
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    (port,) = service["spec"]["ports"]
    for secret in secrets:
        assert secret["stringData"]["AWS_ENDPOINT_URL"] == f"http://{name}.{namespace}.svc:{port['port']}"


def helm_test(address: str, patience: str = "60") -> subprocess.CompletedProcess[str]:
    """Run the container of the `helm test` pod against `address` instead of the operator's Service."""
    (container,) = find(objects(), "Pod")["spec"]["containers"]
    assert container["command"] == ["python3", "-c"]
    script, service = container["args"]
    assert service == "http://tune-finetune-operator.finetune.svc:8080"
    script = script.replace("patience_seconds = sys.argv[1], 60", f"patience_seconds = sys.argv[1], {patience}")
    return subprocess.run([sys.executable, "-c", script, address], capture_output=True, text=True, timeout=120)


def test_helm_test_passes_on_a_healthy_operator(cluster: Cluster, namespace: str, tmp_path: Path) -> None:
    with operator_process.running(cluster.kubeconfig, tmp_path, {"namespaces": [namespace]}) as operator:
        found = helm_test(operator.url)
    assert found.returncode == 0, found.stderr
    assert "healthy" in found.stdout


def test_helm_test_fails_with_a_sentence_when_nobody_answers() -> None:
    found = helm_test(f"http://127.0.0.1:{free_port()}", patience="1")
    assert found.returncode == 1
    assert found.stderr.startswith("The operator is not well: ")
    assert "Traceback" not in found.stderr


def test_helm_test_is_not_content_with_another_server(endpoint: str) -> None:
    found = helm_test(endpoint, patience="1")
    assert found.returncode == 1
