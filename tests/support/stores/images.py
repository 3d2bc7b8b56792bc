"""Adapters as images, and the registry that they are pushed to."""

from pathlib import Path

from finetune_api.uri import parse
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.oci.store import OciStore
from finetune_trainer.stores.open import open_store
from support.stores.bundles import bundle_of
from support.stores.registry import PASSWORD, Registry

FILES = {
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": bytes(range(256)) * 9000,
    "training/job.yaml": b"spec: {}\n",
    "empty.txt": b"",
}


def open_image(registry: Registry, name: str, folder: Path, password: str = PASSWORD, **keys: str) -> OciStore:
    """The image with the credentials of a mounted Secret, which has `keys`, too."""
    secret = folder / "secrets" / "oci"
    secret.mkdir(parents=True, exist_ok=True)
    (secret / ".dockerconfigjson").write_text(registry.docker_config(password))
    for key, value in keys.items():
        (secret / key).write_text(value)
    credentials = Credentials.for_role("oci", env={}, secrets_dir=folder / "secrets")
    store = open_store(parse(registry.uri(name), ("oci",)), credentials, field="output.oci.uri")
    assert isinstance(store, OciStore)
    return store


def bundle(folder: Path) -> Bundle:
    return bundle_of(folder, FILES)
