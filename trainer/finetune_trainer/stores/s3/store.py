"""A store in an S3 bucket, or anything that speaks S3 (path-style addressing where an endpoint is given).

Uploads are checked twice: the request carries a full-object CRC32, which the server compares with what it received, and
the object's own checksum is read with HEAD. Without one, the object is read back and compared by SHA-256.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from botocore.exceptions import ClientError

from finetune_api import artifact_manifest, constants
from finetune_api.uri import Uri
from finetune_trainer.stores import fsync
from finetune_trainer.stores.base import Entry, OnProgress, Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import (
    CHUNK_BYTES,
    Digest,
    digest_bytes,
    digest_chunks,
    digest_file,
)
from finetune_trainer.stores.errors import (
    AlreadyExists,
    StoreCorrupted,
    StoreMisconfigured,
    StoreNotFound,
    on_local_disk,
    too_large,
)
from finetune_trainer.stores.s3 import client as s3_client
from finetune_trainer.stores.s3 import errors, retry

_DELETE_THREADS: Final = 8
#: Of one listing. A page has up to a thousand objects; a server that lies may go on for ever, with empty ones too.
MAX_OBJECTS: Final = 1_000_000
MAX_PAGES: Final = 10_000

T = TypeVar("T")


class S3Store(Store):
    """Everything below s3://bucket/prefix. Safe to use from several threads."""

    def __init__(self, root: Uri, credentials: Credentials, field: str) -> None:
        super().__init__(root, field)
        self._credentials = credentials
        self._bucket = root.authority
        self._prefix = f"{root.path.strip('/')}/" if root.path.strip("/") else ""
        self._lock = threading.Lock()
        self._clients: s3_client.Clients | None = None
        self._bucket_seen = False
        self._outage_seconds = self._seconds(constants.ENV_STORE_PATIENCE, retry.OUTAGE_SECONDS)
        self._timeout = self._seconds(constants.ENV_STORE_TIMEOUT, s3_client.DATA_READ_TIMEOUT)

    def exists(self, path: str) -> bool:
        return self._head(path) is not None

    def size(self, path: str) -> int:
        head = self._head(path)
        if head is None:
            raise StoreNotFound(f"{self._location(path).subject} does not exist")
        with self._explained(path):
            return s3_client.size_of(head)

    def list(self, prefix: str = "") -> list[Entry]:
        folder = f"{prefix.strip('/')}/" if prefix.strip("/") else ""

        def run() -> list[Entry]:
            pages = self._s3.control.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix + folder
            )
            objects: list[dict[str, Any]] = []
            for number, page in enumerate(pages):
                objects += page.get("Contents", [])
                if number >= MAX_PAGES or len(objects) > MAX_OBJECTS:
                    raise StoreMisconfigured(
                        f"{self._location(prefix).subject} lists more than {MAX_OBJECTS:,} objects, or in more than"
                        f" {MAX_PAGES:,} pages: choose a URI with fewer below it"
                    )
            self._bucket_seen = True
            # A key that ends in "/" stands for a folder in some tools.
            return sorted(self._entry(item) for item in objects if not item.get("Key", "").endswith("/"))

        return self._repeat(prefix, run)

    def read_bytes(self, path: str, limit: int = artifact_manifest.MAX_BYTES) -> bytes:
        def run() -> bytes:
            data = bytearray()
            with closing(self._s3.control.get_object(Bucket=self._bucket, Key=self._key(path))["Body"]) as body:
                for chunk in body.iter_chunks(CHUNK_BYTES):
                    data += chunk
                    if len(data) > limit:
                        break
            return bytes(data)

        data = self._repeat(path, run)
        if len(data) > limit:
            raise too_large(self._location(path).subject, limit)
        return data

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        def run() -> dict[str, Any]:
            if not start:
                return dict(self._s3.data.get_object(Bucket=self._bucket, Key=self._key(path)))
            return dict(self._s3.ranges.get_object(Bucket=self._bucket, Key=self._key(path), Range=f"bytes={start}-"))

        answer = self._repeat(path, run)
        with self._explained(path), closing(answer["Body"]) as body:
            yield from body.iter_chunks(CHUNK_BYTES)

    def digest(self, path: str) -> Digest:
        return self._repeat(path, lambda: self._read_through(path))

    def write_bytes(self, path: str, data: bytes, if_none_match: bool = False) -> None:
        digest = digest_bytes(data)
        mine = False  # whether an earlier try of ours was accepted, so that a broken object there is our own

        def run() -> None:
            nonlocal mine
            condition = {"IfNoneMatch": "*"} if if_none_match and not mine else {}
            try:
                self._put_if(path, data, digest, **condition)
            except ClientError as error:
                if errors.status_of(error) != 412:
                    raise
                # Perhaps our own first try got through and only its answer was lost.
                if self.read_bytes(path) != data:
                    raise AlreadyExists(f"{self._location(path).subject} is already there") from None
            mine = True
            self._check(path, digest)

        self._repeat(path, run)

    def replace_bytes(self, path: str, data: bytes, expected: bytes) -> None:
        digest = digest_bytes(data)

        def run() -> None:
            answer = self._s3.control.get_object(Bucket=self._bucket, Key=self._key(path))
            with closing(answer["Body"]) as body:
                found = body.read(max(len(data), len(expected)) + 1)
            if found == data:  # our own first try got through, and only its answer was lost
                return
            if found != expected:
                raise AlreadyExists(f"{self._location(path).subject} was changed by somebody else meanwhile")
            try:
                self._put_if(path, data, digest, IfMatch=str(answer.get("ETag", "")))
            except ClientError as error:
                if errors.status_of(error) not in (409, 412):
                    raise
                if (now := self.read_bytes(path)) == data:  # the same, within one request
                    return
                if now == expected and errors.status_of(error) == 412:
                    raise StoreMisconfigured(
                        f"{self._location(path).subject} is refused with the ETag that it has itself"
                        f" ({str(answer.get('ETag'))[:80]}): a proxy in between, or the store, changes ETags"
                    ) from None
                raise AlreadyExists(f"{self._location(path).subject} was changed by somebody else meanwhile") from None

        self._repeat(path, run)

    def honors_conditions(self, path: str) -> bool:
        probe = f"{path}.{uuid.uuid4().hex}.probe"
        data = b"asks whether this store honors If-Match\n"

        def run() -> bool:
            try:
                self._put(probe, data, digest_bytes(data), IfMatch=f'"{"0" * 32}"')
            except ClientError as error:
                if errors.status_of(error) == errors.NOT_IMPLEMENTED:
                    return False
                # S3 says 404 of an object that is not there; a server that knows no condition would have made it. Keys
                # that may write the pointer alone (403) come from servers with such policies, and these honor it.
                if errors.status_of(error) in (403, 404, 412) and errors.code_of(error) != "NoSuchBucket":
                    return True
                raise
            self._s3.control.delete_object(Bucket=self._bucket, Key=self._key(probe))
            return False

        return self._repeat(probe, run)

    def upload(
        self, local: Path, path: str, on_progress: OnProgress | None = None, digest: Digest | None = None
    ) -> None:
        expected = digest or digest_file(local)

        def run() -> None:
            if expected.size < s3_client.MULTIPART_BYTES:
                with local.open("rb") as file:
                    self._put(path, file, expected)
                if on_progress is not None:
                    on_progress(expected.size)
            else:
                self._abort_leftovers(path)
                self._s3.send(local, self._bucket, self._key(path), self._checksum(expected), on_progress)
            self._check(path, expected)

        self._repeat(path, run)

    def download(
        self, path: str, local: Path, on_progress: OnProgress | None = None, sha256: str | None = None
    ) -> None:
        partial = local.with_name(f".{local.name}.{uuid.uuid4().hex}.partial")
        tries = retry.RangeTries()

        def run() -> None:
            head = self._s3.control.head_object(Bucket=self._bucket, Key=self._key(path), ChecksumMode="ENABLED")
            got = self._s3.fetch(self._bucket, self._key(path), partial, head, tries, on_progress)
            self._compare(path, got, head, sha256)
            fsync.replace(partial, local)

        with on_local_disk(self._location(path).subject, local.parent):
            try:
                local.parent.mkdir(parents=True, exist_ok=True)
                self._repeat(path, run, tries)
            finally:
                partial.unlink(missing_ok=True)

    def delete(self, path: str) -> None:
        self._repeat(path, lambda: self._s3.control.delete_object(Bucket=self._bucket, Key=self._key(path)))

    def delete_prefix(self, prefix: str) -> None:
        with ThreadPoolExecutor(_DELETE_THREADS) as pool:
            list(pool.map(self.delete, [entry.path for entry in self.list(prefix)]))

    @property
    def _s3(self) -> s3_client.Clients:
        with self._lock:
            if self._clients is None:
                self._location("")  # raises for an endpoint that is no URL
                # From the pod's environment alone: a Secret is the user's, and could name itself allowed.
                allowed = os.environ.get(constants.ENV_ALLOWED_S3_ENDPOINTS, "")
                if not s3_client.is_allowed(self._credentials, allowed):
                    raise StoreMisconfigured(
                        f"{self._location('').subject}: this endpoint is not allowed here; allowed: {allowed}"
                        " (administrator's rule policy.allowedS3Endpoints)"
                    )
                try:
                    self._clients = s3_client.connect(self._credentials, self._timeout)
                except s3_client.InvalidSetting as error:
                    raise self._misconfigured(error) from None
            return self._clients

    def _entry(self, item: dict[str, Any]) -> Entry:
        if "Key" not in item or "Size" not in item:
            raise ValueError("an object without a key or a size in a listing")
        return Entry(item["Key"].removeprefix(self._prefix), int(item["Size"]), item.get("ETag", ""))

    def _key(self, path: str) -> str:
        return self._prefix + path if path else self._prefix.rstrip("/")

    def _checksum(self, digest: Digest) -> dict[str, str]:
        if not self._s3.sends_checksums:
            return {}
        return {"ChecksumAlgorithm": "CRC32", "ChecksumCRC32": digest.crc32_base64}

    def _put(self, path: str, body: Any, digest: Digest, **condition: str) -> None:
        extra = self._checksum(digest) | condition
        self._s3.data.put_object(Bucket=self._bucket, Key=self._key(path), Body=body, **extra)

    def _put_if(self, path: str, data: bytes, digest: Digest, **condition: str) -> None:
        """Put on a condition; where the server says that it knows none, compare and put."""
        try:
            self._put(path, data, digest, **condition)
        except ClientError as error:
            if not condition or errors.status_of(error) != errors.NOT_IMPLEMENTED:
                raise
            if "IfNoneMatch" in condition and self.exists(path) and self.read_bytes(path) != data:
                raise AlreadyExists(f"{self._location(path).subject} is already there") from None
            self._put(path, data, digest)

    def _abort_leftovers(self, path: str) -> None:
        """Parts of an upload whose process was killed are invisible, yet paid for; there is one writer to a path."""
        client, key = self._s3.control, self._key(path)
        with suppress(*errors.S3_ERRORS):  # not every server can, not every key may
            for upload in client.list_multipart_uploads(Bucket=self._bucket, Prefix=key).get("Uploads", []):
                if upload["Key"] == key:
                    client.abort_multipart_upload(Bucket=self._bucket, Key=key, UploadId=upload["UploadId"])

    def _head(self, path: str) -> dict[str, Any] | None:
        def run() -> dict[str, Any] | None:
            try:
                return dict(self._s3.control.head_object(Bucket=self._bucket, Key=self._key(path)))
            except ClientError as error:
                if not errors.is_missing_object(error):
                    raise
                self._require_bucket(path)
                return None

        return self._repeat(path, run)

    def _require_bucket(self, path: str) -> None:
        """Ask once whether the bucket exists: a HEAD's 404 does not tell the object from the bucket."""
        if self._bucket_seen:
            return
        try:
            self._s3.control.head_bucket(Bucket=self._bucket)
        except ClientError as error:
            if errors.status_of(error) == 404:
                raise errors.missing_bucket(self._location(path)) from None
            if errors.status_of(error) != 403:  # allowed to read objects but not the bucket: it is there
                raise
        self._bucket_seen = True

    def _check(self, path: str, expected: Digest) -> None:
        """Check that the store holds `expected`, by its full-object checksum, else by reading the object back.

        A checksum without a type may be the one we sent, merely kept: only a server that names the type computed it.
        """
        head = self._s3.control.head_object(Bucket=self._bucket, Key=self._key(path), ChecksumMode="ENABLED")
        if (size := s3_client.size_of(head)) != expected.size:
            raise self._corrupted(path, f"has {size} bytes, not {expected.size}")
        if head.get("ChecksumType") == "FULL_OBJECT" and "ChecksumCRC32" in head:
            if head["ChecksumCRC32"] != expected.crc32_base64:
                raise self._corrupted(path, "has another checksum than the file sent")
            return
        if self._read_through(path) != expected:
            raise self._corrupted(path, "does not hold the bytes sent")

    def _read_through(self, path: str) -> Digest:
        body = self._s3.data.get_object(Bucket=self._bucket, Key=self._key(path))["Body"]
        return digest_chunks(body.iter_chunks(CHUNK_BYTES))

    def _compare(self, path: str, got: Digest, head: dict[str, Any], sha256: str | None) -> None:
        if got.size != (size := s3_client.size_of(head)):
            raise self._corrupted(path, f"arrived with {got.size} of {size} bytes")
        if sha256 is not None:
            if got.sha256 != sha256:
                raise self._corrupted(path, f"has SHA-256 {got.sha256}, not {sha256}")
        elif (
            head.get("ChecksumType") == "FULL_OBJECT"
            and head.get("ChecksumCRC32", got.crc32_base64) != got.crc32_base64
        ):
            raise self._corrupted(path, "arrived with another checksum than the store's")

    def _corrupted(self, path: str, how: str) -> StoreCorrupted:
        return StoreCorrupted(f"{self._location(path).subject} {how}")

    def _location(self, path: str) -> errors.Location:
        try:
            endpoint = s3_client.shown_endpoint(self._credentials)
        except s3_client.InvalidSetting as error:
            raise self._misconfigured(error) from None
        return errors.Location(self.field, self._credentials, self.uri_of(path), self._bucket, endpoint)

    def _misconfigured(self, error: Exception) -> StoreMisconfigured:
        return errors.invalid_setting(error, self.field, self._credentials)

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        try:
            yield
        except errors.S3_ERRORS as error:
            if errors.is_missing_object(error):
                with suppress(*errors.S3_ERRORS):
                    self._require_bucket(path)
            raise errors.explain(error, self._location(path)) from error

    def _repeat(self, path: str, run: Callable[[], T], ranges: retry.RangeTries | None = None) -> T:
        """Run with retries, and raise errors in the store's words."""
        policy = retry.retry_policy(self._outage_seconds, ranges)
        with self._explained(path):
            return policy(run)

    def _seconds(self, key: str, default: float) -> float:
        text = self._credentials.get(key)
        try:
            return float(text) if text else default
        except ValueError:
            raise self._misconfigured(s3_client.InvalidSetting(key, "a number of seconds")) from None
