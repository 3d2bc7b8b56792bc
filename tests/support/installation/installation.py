"""A whole installation for end-to-end tests: cluster, process node, operator, S3 server, and a team's namespace on it.

The trainer is the real one; it reads model and data from S3 with the keys of a Secret, as in production.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api import constants
from support.node.node import ProcessNode
from support.operator import process
from support.operator.process import OperatorProcess
from support.server.client import Kube, Object, wait_until
from support.server.server import Cluster
from support.stores.s3 import S3Server
from support.trainer.tiny_model import nli_rows

SECRET = "s3-keys"
#: Seconds for a tiny run on a busy machine: the trainer's imports alone may take half a minute.
PATIENCE = 240.0


@dataclass
class Stage:
    """Everything a story needs. `bucket` holds the model below model/ and rows in train.jsonl and eval.jsonl."""

    cluster: Cluster
    kube: Kube
    node: ProcessNode
    s3: S3Server
    bucket: str
    folder: Path

    @contextmanager
    def operator(self, name: str = "operator", **settings: object) -> Iterator[OperatorProcess]:
        """A running operator for this namespace."""
        values = {"namespaces": [self.kube.namespace], "termination_grace_seconds": 30, **settings}
        with process.running(self.cluster.kubeconfig, self.folder / name, values) as running:
            yield running

    def secret(self, name: str = SECRET, **changes: str) -> None:
        """A Secret with working keys for the S3 server, but for `changes`."""
        data = self.s3.env | changes
        self.kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data})

    def manifest(self, name: str = "nli", **sections: Any) -> Object:
        """A run of a few steps on the CPU; `sections` are merged into those of its spec."""
        keys = {"secretRef": {"name": SECRET}}
        root = f"s3://{self.bucket}"
        spec: Object = {
            "model": {"source": f"{root}/model", **keys},
            "dataset": {"train": f"{root}/train.jsonl", "eval": f"{root}/eval.jsonl", **keys},
            "lora": {"rank": 4, "alpha": 8},
            "training": {"maxSteps": 6, "batchSize": 4, "learningRate": 0.01, "maxLength": 128},
            "evaluation": {"everySteps": 3},
            "checkpoint": {"everySteps": 2},
            "logging": {"everySteps": 1},
            "resources": {"gpusPerNode": 0},
            "recovery": {"maxAttempts": 2, "backoffSeconds": 0},
            "output": {"uri": f"{root}/adapters/{name}", **keys},
        }
        for section, change in sections.items():
            spec[section] = {**spec[section], **change} if isinstance(change, dict) else change
        metadata = {"name": name, "namespace": self.kube.namespace}
        return {"apiVersion": constants.API_VERSION, "kind": constants.KIND, "metadata": metadata, "spec": spec}

    def get(self, name: str = "nli") -> Object:
        return self.kube.get(constants.KIND, name)

    def condition(self, kind: str, name: str = "nli") -> Object:
        return condition_of(self.get(name), kind)

    def wait_for(self, kind: str, status: str, name: str = "nli", seconds: float = PATIENCE) -> Object:
        """Until the condition has that status; AssertionError with what the pods printed when it ends otherwise."""

        def look() -> Object | None:
            job = self.get(name)
            found, over = condition_of(job, kind), condition_of(job, "Succeeded")
            if found.get("status") != status and over.get("status") in ("True", "False"):
                raise AssertionError(f"{name} ended as {over}")
            return found if found.get("status") == status else None

        try:
            return wait_until(look, f"{name} is {kind}={status}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.get(name).get('status')}\n{self.node.all_logs()[-3000:]}") from None

    def pods(self, name: str = "nli") -> list[Object]:
        return self.kube.list("Pod", labelSelector=f"{constants.LABEL_JOB}={name}")

    def children(self) -> list[str]:
        """Everything in the namespace that the operator and Kubernetes made for jobs, as Kind/name."""
        found = []
        for kind in ("Job", "Pod", "ConfigMap", "Service"):
            objects = self.kube.list(kind)
            found += [f"{kind}/{obj['metadata']['name']}" for obj in objects if obj["metadata"].get("ownerReferences")]
        return found


def condition_of(obj: Object, kind: str) -> Object:
    """The condition of that type, or an empty one."""
    conditions = (obj.get("status") or {}).get("conditions") or []
    return next((condition for condition in conditions if condition["type"] == kind), {})


def fill_bucket(s3: S3Server, bucket: str, model: Path) -> None:
    """Put the model and the rows there."""
    client = s3.client()
    for file in sorted(model.iterdir()):
        client.upload_file(str(file), bucket, f"model/{file.name}")
    for name, count, seed in (("train", 40, 0), ("eval", 12, 5)):
        body = "".join(json.dumps(row) + "\n" for row in nli_rows(count, seed))
        client.put_object(Bucket=bucket, Key=f"{name}.jsonl", Body=body.encode())


def verify_digests(files: dict[str, bytes], manifest_digest: str) -> Object:
    """Check every file of a published prefix against its manifest.json, and that against `manifest_digest`."""
    raw = files[constants.MANIFEST_FILE]
    assert manifest_digest == "sha256:" + hashlib.sha256(raw).hexdigest()
    manifest: Object = json.loads(raw)
    listed = {entry["path"]: entry for entry in manifest["files"]}
    assert {constants.ADAPTER_CONFIG_FILE, constants.ADAPTER_WEIGHTS_FILE, "README.md", constants.METRICS_FILE} <= set(
        listed
    )
    for path, entry in listed.items():
        assert len(files[path]) == entry["sizeBytes"], path
        assert hashlib.sha256(files[path]).hexdigest() == entry["sha256"], path
    unlisted = {path for path in files if not path.startswith(f"{constants.CHECKPOINTS_DIR}/")} - set(listed)
    assert unlisted == {constants.MANIFEST_FILE}
    return manifest
