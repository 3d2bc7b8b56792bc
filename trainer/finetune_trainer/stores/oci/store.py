"""An image in an OCI registry as a store: each file is a layer, and the tag names them once manifest.json is written.

It is an image like others, for every processor: Kubernetes mounts it as a volume (image volumes), and files that did
not change are layers that nodes have already.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

from finetune_api import constants
from finetune_api.artifact_manifest import fault_of_path
from finetune_api.uri import Uri
from finetune_trainer.stores.base import Entry, OnProgress
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.errors import AlreadyExists, StoreCorrupted, StoreMisconfigured, StoreNotFound
from finetune_trainer.stores.oci.client import Body, RegistryClient
from finetune_trainer.stores.oci.layer import Layer, tar
from finetune_trainer.stores.streamed import StreamedStore

log = logging.getLogger(__name__)
INDEX: Final = "application/vnd.oci.image.index.v1+json"
MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
#: Nodes take the image of their own processor; all have the same layers.
PROCESSORS: Final = ("amd64", "arm64")

#: Answers to the deletion of a tag: it is gone, or the registry does not do that, or not for this user.
_GONE: Final = (202, 204, 404)
_DELETED: Final = (*_GONE, 400, 401, 403, 405, 501)


class OciStore(StreamedStore):
    """The image at one tag of one repository."""

    def __init__(self, root: Uri, credentials: Credentials, field: str) -> None:
        """Open oci://registry/repository:tag. Makes no request; raises StoreMisconfigured."""
        super().__init__(root, field)
        repository, _, self._tag = root.path.rpartition(":")
        self._client = RegistryClient(root.authority, repository, credentials, field)
        self._pending: dict[str, Layer] = {}

    def uri_of(self, path: str) -> str:
        return f"{self.root}, {path}" if path else str(self.root)

    def entries(self) -> list[Entry]:
        layers = {each.path: each for each in self._layers()} | self._pending
        return [Entry(each.path, each.length, each.digest) for each in layers.values()]

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        layer = self._pending.get(path) or next((each for each in self._layers() if each.path == path), None)
        if layer is None:
            raise StoreNotFound(f"{self.field}: {self.uri_of(path)} does not exist")
        if layer.length > start:
            yield from self._client.blob(layer.digest, layer.offset + start, layer.length - start)

    def upload(
        self, local: Path, path: str, on_progress: OnProgress | None = None, digest: Digest | None = None
    ) -> None:
        self._pending[path] = self._push(Layer.of(path, local), local)
        if on_progress:
            on_progress(local.stat().st_size)

    def write_bytes(self, path: str, data: bytes, if_none_match: bool = False) -> None:
        if path == constants.MANIFEST_FILE and if_none_match and self.exists(path) and self.read_bytes(path) != data:
            raise AlreadyExists(f"{self.field}: {self.root} is taken by another adapter")
        self._pending[path] = self._push(Layer.of(path, data), data)
        if path == constants.MANIFEST_FILE:
            self._tag_image()
            self._pending.clear()

    def delete(self, path: str) -> None:
        """Forget a file that was uploaded. With manifest.json the tag goes, where the registry lets users delete one.

        Never the image itself: other tags may name it too, and would go with it.
        """
        self._pending.pop(path, None)
        if path == constants.MANIFEST_FILE:
            response, _ = self._client.ask("DELETE", f"manifests/{self._tag}", good=_DELETED)
            if response.status not in _GONE:
                log.warning(
                    f"{self.field}: {self.root} stays until another image takes its tag: the registry deletes no tag"
                    f" (HTTP {response.status})"
                )

    def _push(self, layer: Layer, content: Path | bytes) -> Layer:
        self._push_blob(layer.digest, layer.size, partial(tar, layer.path, content))
        return layer

    def _push_blob(self, digest: str, size: int, body: Body) -> None:
        """Upload a blob that the registry lacks."""
        response, _ = self._client.ask("HEAD", f"blobs/{digest}", good=(200, 404))
        if response.status == 404:
            self._client.upload(digest, size, body)
            response, _ = self._client.ask("HEAD", f"blobs/{digest}")
        if response.headers.get("Content-Length") not in (None, str(size)):
            raise StoreCorrupted(f"{self.field}: {self.root} has another size of {digest} than was sent")

    def _tag_image(self) -> None:
        """Write the image's manifests, then name them by the tag."""
        layers = [each.descriptor() for _, each in sorted(self._pending.items())]
        images = []
        for processor in PROCESSORS:
            history = {"type": "layers", "diff_ids": [each["digest"] for each in layers]}
            config = _json({"architecture": processor, "os": "linux", "config": {}, "rootfs": history})
            described = _described(CONFIG, config)
            self._push_blob(described["digest"], len(config), partial(iter, (config,)))
            manifest = _json({"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": layers})
            found = _described(MANIFEST, manifest)
            self._put(found["digest"], manifest, MANIFEST)
            images.append(found | {"platform": {"architecture": processor, "os": "linux"}})
        self._put(self._tag, _json({"schemaVersion": 2, "mediaType": INDEX, "manifests": images}), INDEX)

    def _put(self, reference: str, data: bytes, kind: str) -> None:
        self._client.ask("PUT", f"manifests/{reference}", {"Content-Type": kind}, data, good=(201,))

    def _layers(self) -> list[Layer]:
        """Return the layers of the image at the tag; none if there is no such tag.

        Raises:
            StoreMisconfigured: There is an image of another kind.
        """
        response, body = self._client.ask(
            "GET", f"manifests/{self._tag}", {"Accept": f"{INDEX}, {MANIFEST}"}, good=(200, 404)
        )
        if response.status == 404:
            return []
        try:
            digest = str(json.loads(body)["manifests"][0]["digest"])
            _, manifest = self._client.ask("GET", f"manifests/{digest}", {"Accept": MANIFEST})
            if _described(MANIFEST, manifest)["digest"] != digest:
                raise StoreCorrupted(f"{self.field}: {self.root} has a manifest of another digest than its index says")
            layers = [Layer.read(each) for each in json.loads(manifest)["layers"]]
            faults = [each.path for each in layers if fault_of_path(each.path)]
            if faults:
                raise ValueError(f"a file of a name that is not safe: {faults[0]!r}")
        except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
            why = f": {error}" if type(error) is ValueError else ""
            raise StoreMisconfigured(f"{self.field}: {self.root} is an image of another kind{why}") from None
        return layers


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _described(kind: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
