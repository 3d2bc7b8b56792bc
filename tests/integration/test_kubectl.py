"""What kubectl sends arrives, whatever form it sends it in."""

import base64
import os
import shutil
import subprocess

import pytest

from support.server.client import Kube
from support.server.server import Cluster


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_a_secret_made_by_kubectl_arrives_whole(either_cluster: Cluster, either: Kube) -> None:
    """Since 1.32 kubectl sends it as protobuf."""
    command = ["kubectl", "create", "secret", "generic", "keys", "--namespace", str(either.namespace)]
    literals = {"HF_TOKEN": "hf_…", "empty": "", "long": "x" * 300}
    env = os.environ | {"KUBECONFIG": str(either_cluster.kubeconfig)}
    made = subprocess.run(
        [*command, *(f"--from-literal={key}={value}" for key, value in literals.items())],
        env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    secret = either.get("Secret", "keys")
    assert {key: base64.b64decode(value).decode() for key, value in secret["data"].items()} == literals
    assert secret["type"] == "Opaque"
