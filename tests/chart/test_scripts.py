"""The small programs the chart carries, run as their pods run them: the S3 server for trials, and `helm test`."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest

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
    process = Process([sys.executable, script, address, *container["args"][1:]], tmp_path / "s3.log")
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
