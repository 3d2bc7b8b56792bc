"""Publish an adapter so that readers see all of it, verified, or nothing.

Order: delete the old manifest if it may be replaced, upload and check every file, let the caller load back what was
uploaded, write manifest.json (If-None-Match: *, unless overwriting), read everything once more. A crash anywhere leaves
either no manifest, or one over complete files that were loaded back.

The prefix is flat, because readers take it as a PEFT folder. So an adapter that is replaced is gone from the first
upload on (callers verify the local one first), and two jobs with one output.uri would overwrite each other's files: a
publisher looks for a manifest before every file and stops if it is another job's. (A file that is being uploaded at
that moment can still overwrite the other's: two live jobs must not share a URI.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import structlog

from finetune_api import constants
from finetune_api.artifact_manifest import JobReference, StoreManifest
from finetune_api.artifact_names import COPIES
from finetune_api.status import Adapter
from finetune_api.uri import PUSHED, parse
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.settings import Settings
from finetune_trainer.stores import manifest as store_manifest
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import Digest, digest_file
from finetune_trainer.stores.errors import AlreadyExists, StoreCorrupted
from finetune_trainer.stores.manifest import Job
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.signature import SigningKey, signing_key

log = structlog.get_logger(__name__)
_PROBE: Final = f"{constants.TRAINING_DIR}/.write-check"


#: Called with the output and the digests of the uploaded files, by path.
BeforeManifest = Callable[["AdapterOutput", Mapping[str, Digest]], Mapping[str, float] | None]


@dataclass(frozen=True)
class AdapterOutput:
    """Where one job publishes its adapter: `store` is the folder of output.uri. Knows nothing of torch."""

    store: Store
    job: Job
    overwrite: bool = False
    key: SigningKey | None = None

    @classmethod
    def open(cls, settings: Settings, folder: str = "") -> "AdapterOutput":
        """Open output.uri, a folder below it, or the place of an artifact, with the signing key of the role `output`.

        Makes no request yet; raises StoreError.
        """
        credentials = Credentials.for_role("output", secrets_dir=settings.environment.secrets)
        output = settings.spec.output
        return cls(
            open_output(settings, folder), settings.job.metadata, output.overwrite, signing_key(credentials.values)
        )

    def find_published(self) -> Adapter | None:
        """Check that the store can take the adapter; call it before anything expensive.

        Returns:
            This job's own adapter, every byte compared, when an earlier attempt has already published it.

        Raises:
            AlreadyExists: Another adapter is there, a job's or any, and `overwrite` is false.
            StoreError: The bucket is missing, the keys are wrong, or they may only read (a small object is written
                and deleted).
        """
        store = self.store
        of_a_job = bool(store.list(constants.TRAINING_DIR))  # uploaded before the weights are
        found = self._existing()
        if found is not None and (published := self._published_by_this_job(*found)):
            return published
        if found is None and not of_a_job and not self.overwrite and store.exists(constants.ADAPTER_WEIGHTS_FILE):
            raise AlreadyExists(
                f"{store.field}: {store.root} already holds an adapter, with no manifest of ours: change the URI, or"
                " set output.overwrite: true to replace it"
            )
        if found is not None:
            made = found[0].created_at.astimezone(UTC)
            log.warning(f"Replacing the adapter of {made:%Y-%m-%d %H:%M} UTC at {store.root}: output.overwrite is true")
        store.check_writable(_PROBE)
        return None

    def publish(self, bundle: Bundle, before_manifest: BeforeManifest = lambda output, digests: None) -> Adapter:
        """Publish every file of `bundle` at the store's root; an adapter that this job published before is kept.

        Args:
            bundle: The folder to publish, and what the manifest says of it.
            before_manifest: Gets this output and the digests of the uploaded files by path; what it raises keeps the
                manifest from being written, and what it returns is added to the manifest's metrics.

        Returns:
            The adapter, once all of it was read back and compared.

        Raises:
            AlreadyExists: Another job's adapter is there, and `overwrite` is false.
            StoreError: The store failed, or holds other bytes than were sent.
            ValueError: The folder holds no adapter.
        """
        store, overwrite = self.store, self.overwrite
        digests = _digests(bundle)
        existing = self._existing()
        if existing is not None and (published := self._published_by_this_job(*existing)):
            return published
        if existing is not None or (overwrite and store.exists(constants.MANIFEST_FILE)):
            store.delete(constants.MANIFEST_FILE)

        for path, digest in digests.items():
            if not overwrite:
                self._require_no_manifest()
            store.upload(bundle.folder / path, path, digest=digest)
        _require_listed(store, digests)
        measured = before_manifest(self, digests) or {}
        manifest = StoreManifest(
            kind=bundle.artifact.kind,
            job=JobReference(namespace=self.job.namespace, name=self.job.name, uid=self.job.uid),
            created_at=datetime.now(UTC),
            base_model=bundle.base_model,
            rank=bundle.rank,
            step=bundle.step,
            files=store_manifest.records(digests),
            metrics={**bundle.metrics, **measured},
            base_commit=bundle.base_commit,
            lineage=bundle.lineage,
            gate=list(bundle.gate) or None,
        )
        if self.key:
            manifest = manifest.model_copy(update={"signature": self.key.sign(manifest.to_bytes())})
        data = manifest.to_bytes()
        store.write_bytes(constants.MANIFEST_FILE, data, if_none_match=not overwrite)
        _confirm(store, manifest, data)
        if existing is not None:
            _delete_stale(store, old=existing[0], new=manifest)
        return _adapter(store, manifest, data)

    def _existing(self) -> tuple[StoreManifest, bytes] | None:
        """Return the manifest at the target. One that cannot be read counts as another job's: None if `overwrite`."""
        try:
            return store_manifest.read(self.store)
        except StoreCorrupted as error:
            if self.overwrite:
                return None
            raise AlreadyExists(f"{error}; move it away, change the URI, or set output.overwrite: true") from None

    def _published_by_this_job(self, manifest: StoreManifest, data: bytes) -> Adapter | None:
        """Return the adapter of `manifest` if it is this job's and complete. Raises AlreadyExists if another job's."""
        ours = self.job.uid is not None and manifest.job is not None and manifest.job.uid == self.job.uid
        if ours and _is_whole(self.store, manifest):
            return _adapter(self.store, manifest, data)
        if not ours and not self.overwrite:
            raise _taken(self.store, manifest)
        return None

    def _require_no_manifest(self) -> None:
        existing = self._existing()
        if existing is not None:
            raise _taken(self.store, existing[0])


def open_output(settings: Settings, folder: str = "") -> Store:
    """Open output.uri, or a folder below it; of a copy of the adapter the place of its own. Makes no request yet.

    Raises:
        StoreError: It cannot be opened.
    """
    output, secrets = settings.spec.output, settings.environment.secrets
    if folder in COPIES and (place := getattr(output, folder)) is not None:
        credentials = Credentials.for_role(folder, secrets_dir=secrets)
        return open_store(parse(place.uri, PUSHED), credentials, field=f"output.{folder}.uri")
    credentials = Credentials.for_role("output", secrets_dir=secrets)
    root = parse(output.uri)
    return open_store(root.join(folder) if folder else root, credentials, field="output.uri")


def check_copies(settings: Settings) -> None:
    """Check that every place that the adapter is copied to can take it, before anything expensive.

    Raises:
        AlreadyExists: Another adapter is there, and `overwrite` is false.
        StoreError: It is out of reach, or denies access.
    """
    for name in settings.spec.output.artifacts:
        if name in COPIES:
            AdapterOutput.open(settings, name).find_published()


def _digests(bundle: Bundle) -> dict[str, Digest]:
    """Return the digest of every file to publish, by path; large files last, so that errors show early."""
    folder = bundle.folder
    found = [path for path in folder.rglob("*") if path != folder / constants.MANIFEST_FILE]
    if link := next((path for path in found if path.is_symlink()), None):
        raise ValueError(f"{link} is a symbolic link: only files made by this run are published")
    files = [path for path in found if path.is_file()]
    missing = [name for name in bundle.artifact.required_files if folder / name not in files]
    if missing:
        raise ValueError(f"{folder} holds no {bundle.artifact.kind.lower()}: {' and '.join(missing)} missing")
    files.sort(key=lambda path: (path.stat().st_size, path))
    return {path.relative_to(folder).as_posix(): digest_file(path) for path in files}


def _is_whole(store: Store, manifest: StoreManifest) -> bool:
    try:
        store_manifest.verify(store, manifest)
    except StoreCorrupted:
        return False
    return True


def _taken(store: Store, manifest: StoreManifest) -> AlreadyExists:
    owner = manifest.job or JobReference()
    by = "/".join(part for part in (owner.namespace, owner.name) if part) or "another job"
    return AlreadyExists(
        f"{store.field}: {store.root} already holds an adapter (of {by}, {manifest.created_at:%Y-%m-%d}):"
        " change the URI, or set output.overwrite: true to replace it"
    )


def _require_listed(store: Store, digests: Mapping[str, Digest]) -> None:
    for _ in range(store_manifest.READS):
        sizes = {entry.path: entry.size for entry in store.list()}
        missing = [path for path, digest in digests.items() if sizes.get(path) != digest.size]
        if not missing:
            return
    raise StoreCorrupted(
        f"{store.field}: {store.uri_of(missing[0])} was uploaded, but the listing shows a missing or truncated object"
    )


def _confirm(store: Store, manifest: StoreManifest, data: bytes) -> None:
    """Read everything back. Delete the manifest again, if it is still ours, when something is wrong."""
    try:
        if not any(store.read_bytes(constants.MANIFEST_FILE) == data for _ in range(store_manifest.READS)):
            raise StoreCorrupted(f"{store.field}: another job published at {store.root} at the same time")
        store_manifest.verify(store, manifest)
    except StoreCorrupted:
        if store.exists(constants.MANIFEST_FILE) and store.read_bytes(constants.MANIFEST_FILE) == data:
            store.delete(constants.MANIFEST_FILE)
        raise


def _delete_stale(store: Store, old: StoreManifest, new: StoreManifest) -> None:
    """Delete the old adapter's files that the new one does not have; never files that no manifest names."""
    for path in {file.path for file in old.files} - {file.path for file in new.files}:
        store.delete(path)


def _adapter(store: Store, manifest: StoreManifest, data: bytes) -> Adapter:
    return Adapter(
        uri=str(store.root),
        manifest_digest=store_manifest.digest_of(data),
        size_bytes=manifest.size_bytes,
        base_model=manifest.base_model or "",
        rank=manifest.rank or 0,
    )
