"""Whether a secret shows anywhere it must not: as it is, in a URL, or in base64, alone or inside something longer."""

import base64
from collections.abc import Iterable, Iterator
from urllib.parse import quote, urlsplit

from finetune_api import constants
from support.installation.installation import Stage
from support.server.client import Kube

#: Tokens that a Secret may hold beside S3 keys, whatever it is meant for.
CANARIES = {"HF_TOKEN": "hf_CANARYzQ7pLmX2vRk9", "WANDB_API_KEY": "0123456789abcdef0123456789abcdefCANARY"}
_PUBLIC = ("AWS_REGION", "AWS_EC2_METADATA_DISABLED", "HF_ENDPOINT")
#: Every kind that the operator, the trainer or Kubernetes may write to on behalf of a job.
_KINDS = (constants.KIND, "ConfigMap", "Job", "Pod", "Service", "Event")


def check_that_no_secret_shows(stage: Stage, *texts: str) -> None:
    """Look for every value of the namespace's Secrets in `texts`, logs, objects and published files."""
    secrets = dict(_secrets(stage.kube))
    assert secrets
    places = {f"text {number}": text for number, text in enumerate(texts)}
    places["the pods' logs"] = stage.node.all_logs()
    for log in stage.folder.glob("*/operator.log"):
        places[f"the log of {log.parent.name}"] = log.read_text()
    for kind in _KINDS:
        places[kind] = str(stage.kube.list(kind))
    for key, content in stage.s3.objects(stage.bucket, "adapters/").items():
        places[key] = content.decode(errors="replace")
    found = [
        f"{key} shows in {place} as {form!r}"
        for key, value in secrets.items()
        for form in forms(value)
        for place, text in places.items()
        if form in text
    ]
    assert not found, found


def _secrets(kube: Kube) -> Iterator[tuple[str, str]]:
    for secret in kube.list("Secret"):
        for key, encoded in (secret.get("data") or {}).items():
            value = base64.b64decode(encoded).decode()
            if key.startswith("AWS_ENDPOINT_URL"):
                value = urlsplit(value).password or ""
            if value and key not in _PUBLIC:
                yield f"{secret['metadata']['name']}.{key}", value


def forms(value: str) -> set[str]:
    """How `value` may be written: plain, in a URL, and in base64 wherever in a group of three bytes it begins."""
    return {value, quote(value, safe=""), *_base64(value.encode())}


def _base64(raw: bytes) -> Iterable[str]:
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + raw).decode().rstrip("=")
        first = (0, 2, 3)[before]  # characters that depend on what comes before
        last = len(encoded) - (1 if (before + len(raw)) % 3 else 0)
        yield encoded[first:last]
