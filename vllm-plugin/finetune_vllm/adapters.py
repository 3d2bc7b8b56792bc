"""Find an adapter by name, verify all of it, and keep a verified copy on this machine. Knows nothing of vLLM."""

import logging
from dataclasses import dataclass
from pathlib import Path

from finetune_api.artifact_manifest import StoreManifest, fault_of_name
from finetune_api.uri import parse
from finetune_trainer.errors import TrainerError
from finetune_trainer.stores import latest
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreCorrupted, StoreError
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.signature import require_signature
from finetune_vllm.cache import Cache, Copy
from finetune_vllm.settings import Settings

log = logging.getLogger(__name__)
#: An adapter has less; a server's disk is not filled by a manifest.
MAX_BYTES = 32 << 30
#: Looks at the cache, where other processes make and remove copies at the same time.
_TRIES = 5


class Refused(TrainerError):
    """The adapter is whole, but must not be served here."""


@dataclass(frozen=True)
class Adapter:
    """A verified copy, in use until it is released: `digest` is the SHA-256 of its manifest."""

    digest: str
    copy: Copy

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.copy.folder


class Adapters:
    """The adapters below one prefix."""

    def __init__(self, settings: Settings) -> None:
        """Open the cache; raises NotPrivate if its folder cannot be used."""
        self._settings = settings
        self._cache = Cache(settings.cache, settings.cache_bytes)

    def digest(self, name: str) -> str | None:
        """Return the digest of the manifest that `name` has now; None without an adapter. Raises TrainerError."""
        found = latest.find(self._store(name)) if _is_name(name) else None
        return store_manifest.digest_of(found.data).removeprefix("sha256:") if found else None

    def fetch(self, name: str, base: str) -> Adapter | None:
        """Return a verified copy of the adapter of that name.

        Args:
            name: One folder below the prefix, with an adapter or a latest.json.
            base: The model that the server was started with.

        Returns:
            None if there is no such adapter.

        Raises:
            Refused: It was trained on another base, or is no adapter.
            TrainerError: It is out of reach, damaged, or not signed as it must be.
        """
        if not _is_name(name):
            return None
        store = self._store(name)
        if (found := latest.find(store)) is None:
            return None
        where = store.uri_of(found.path)
        require_signature(found.data, where, self._settings.env)
        self._require_fit(found.manifest, where, base)
        digest = store_manifest.digest_of(found.data).removeprefix("sha256:")
        return Adapter(digest, self._copy(name, store, found, digest))

    def _copy(self, name: str, store: Store, found: latest.Found, digest: str) -> Copy:
        """Return the copy on this machine; one that is damaged is downloaded again."""
        for _ in range(_TRIES):
            if copy := self._cache.use(digest):
                try:
                    kept = open_store(
                        parse(f"file://{copy.folder.absolute()}"), Credentials("output", {}), field="copy"
                    )
                    store_manifest.verify(kept, found.manifest)
                except StoreError as error:
                    log.warning("Adapter %s: its copy here is damaged, downloading it again: %s", name, error)
                    self._cache.discard(copy)
                else:
                    return copy
            elif copy := self._cache.add(
                digest, found.manifest.size_bytes, lambda folder: _download(store, found.path, found.manifest, folder)
            ):
                return copy
        raise StoreCorrupted(f"{self._settings.cache / digest} is changed again and again by another process")

    def _store(self, name: str) -> Store:
        credentials = Credentials.from_environment("output", self._settings.env)
        return open_store(self._settings.prefix.join(name), credentials, field="adapter", env=self._settings.env)

    def _require_fit(self, manifest: StoreManifest, where: str, base: str) -> None:
        served, commit = self._settings.base or base, self._settings.commit
        if manifest.kind != "Adapter":
            raise Refused(f"{where} holds a {manifest.kind}, not an adapter")
        if manifest.base_model != served:
            raise Refused(f"{where} was trained on {manifest.base_model}, and this server serves {served}")
        if commit and manifest.base_commit != commit:
            raise Refused(
                f"{where} was trained on commit {manifest.base_commit} of {served}, this server serves {commit}"
            )
        if manifest.size_bytes > MAX_BYTES:
            raise Refused(f"{where} has {manifest.size_bytes:,} bytes, more than any adapter")


def _download(store: Store, path: str, manifest: StoreManifest, folder: Path) -> None:
    """Download every file and compare it."""
    for file in manifest.files:
        source = f"{path}/{file.path}" if path else file.path
        if (size := store.size(source)) != file.size_bytes:
            raise StoreCorrupted(f"{store.uri_of(source)} has {size:,} bytes, its manifest says {file.size_bytes:,}")
        store.download(source, folder / file.path, sha256=file.sha256)


def _is_name(name: str) -> bool:
    return "/" not in name and not fault_of_name(name) and len(name) <= 253
