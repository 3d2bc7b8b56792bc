"""boto3 clients with bounded timeouts and retries, and whole-file transfers in parallel parts."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import boto3
import botocore.session
from botocore.config import Config
from botocore.exceptions import InvalidRegionError, PartialCredentialsError
from s3transfer.manager import TransferConfig, TransferManager
from s3transfer.subscribers import BaseSubscriber

from finetune_trainer.stores import certificates, endpoints
from finetune_trainer.stores.base import OnProgress
from finetune_trainer.stores.credentials import Credentials, origin
from finetune_trainer.stores.digest import Digest
from finetune_trainer.stores.s3.answers import bound_answers
from finetune_trainer.stores.s3.download import download
from finetune_trainer.stores.s3.retry import RangeTries

bound_answers()

MIB: Final = 1 << 20
#: Files from this size on travel in parts of PART_BYTES, THREADS at a time.
MULTIPART_BYTES: Final = 16 * MIB
PART_BYTES: Final = 8 * MIB
THREADS: Final = 8

#: Seconds. botocore retries only the parts of large uploads, which s3transfer cannot; retry.py does the rest.
CONNECT_TIMEOUT: Final = 5
CONTROL_READ_TIMEOUT: Final = 12
DATA_READ_TIMEOUT: Final = 60
PART_TRIES: Final = 3

#: What an allow-list calls the endpoint of credentials that name none.
AMAZON: Final = "https://s3.amazonaws.com"
_PAIR: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


@dataclass(frozen=True)
class Clients:
    """The clients of one store.

    Attributes:
        control: For small, quick requests.
        data: For requests that move data and may take longer.
        ranges: For reads from an offset, with which some servers send the checksum of the whole object.
        parts: For the parts of large uploads, which botocore retries.
        sends_checksums: Whether uploads carry a CRC32 for the server to compare.
    """

    control: Any
    data: Any
    ranges: Any
    parts: Any
    sends_checksums: bool

    def send(
        self, local: Path, bucket: str, key: str, checksum: dict[str, str], on_progress: OnProgress | None
    ) -> None:
        """Upload a file in parallel parts, read as they are sent. A failed upload leaves no parts behind."""
        with TransferManager(self.parts, _transfer_config()) as manager:
            manager.upload(str(local), bucket, key, dict(checksum), _subscribers(on_progress)).result()

    def fetch(
        self,
        bucket: str,
        key: str,
        local: Path,
        head: dict[str, Any],
        tries: RangeTries,
        on_progress: OnProgress | None,
    ) -> Digest:
        """Download exactly the object whose HEAD is `head`, and return the digest of what arrived."""
        version = {"IfMatch": head["ETag"]} if head.get("ETag") else {}
        size = size_of(head)
        return download(
            partial(self.data.get_object, Bucket=bucket, Key=key, **version),
            size,
            local,
            part_bytes=PART_BYTES if size >= MULTIPART_BYTES else max(size, 1),
            threads=THREADS,
            tries=tries,
            on_progress=on_progress,
        )


class InvalidSetting(Exception):
    """A setting that can never work: its key, and what is allowed. Never shows the value: it may be a secret."""

    def __init__(self, key: str, allowed: str) -> None:
        super().__init__(f"{key} must be {allowed}")


def size_of(head: dict[str, Any]) -> int:
    """Return the bytes of the object whose HEAD is `head`. Raises ValueError if the server does not say."""
    size = int(head.get("ContentLength", -1))
    if size < 0:
        raise ValueError("an object without a length")
    return size


def endpoint_of(credentials: Credentials) -> str | None:
    """Return the S3 endpoint to use, or None for Amazon's."""
    return credentials.get(_endpoint_key(credentials))


def shown_endpoint(credentials: Credentials) -> str:
    """Return the endpoint for messages: scheme, host and port, never a password. Raises InvalidSetting."""
    endpoint = endpoint_of(credentials)
    try:
        return origin(endpoint) if endpoint else "Amazon S3"
    except ValueError:
        raise InvalidSetting(_endpoint_key(credentials), "http://host:port or https://host") from None


def _endpoint_key(credentials: Credentials) -> str:
    return "AWS_ENDPOINT_URL_S3" if credentials.get("AWS_ENDPOINT_URL_S3") else "AWS_ENDPOINT_URL"


def is_allowed(credentials: Credentials, allowed: str) -> bool:
    """Return whether the endpoint matches one of the `allowed` shell patterns (comma-separated; empty allows any).

    See endpoints.is_allowed.
    """
    return endpoints.is_allowed(endpoint_of(credentials) or AMAZON, allowed)


def connect(credentials: Credentials, timeout: float = DATA_READ_TIMEOUT) -> Clients:
    """Create clients for these credentials; nothing is sent yet. Without keys, boto3 searches its usual places.

    Raises:
        BotoCoreError: One key of the pair is missing.
        InvalidSetting: A setting can never work.
    """
    for key, other in (_PAIR, _PAIR[::-1]):
        if credentials.get(key) and not credentials.get(other):
            raise PartialCredentialsError(provider=credentials.role, cred_var=other)
    shown_endpoint(credentials)
    core = botocore.session.get_session()
    bundle = _ca_bundle(credentials, core)
    calculation = (credentials.get("AWS_REQUEST_CHECKSUM_CALCULATION") or "when_supported").lower()
    if calculation not in ("when_supported", "when_required"):
        raise InvalidSetting("AWS_REQUEST_CHECKSUM_CALCULATION", "when_supported or when_required")
    session = boto3.session.Session(
        aws_access_key_id=credentials.get("AWS_ACCESS_KEY_ID"),
        aws_secret_access_key=credentials.get("AWS_SECRET_ACCESS_KEY"),
        aws_session_token=credentials.get("AWS_SESSION_TOKEN"),
        region_name=credentials.get("AWS_REGION") or credentials.get("AWS_DEFAULT_REGION"),
        botocore_session=core,
    )
    endpoint = endpoint_of(credentials)

    def client(read_timeout: float, tries: int = 1, validation: str = "when_supported") -> Any:
        config = Config(
            connect_timeout=min(CONNECT_TIMEOUT, timeout),
            read_timeout=min(read_timeout, timeout),
            retries={"mode": "standard", "total_max_attempts": tries},
            max_pool_connections=4 * THREADS,
            s3={"addressing_style": "path" if endpoint else "auto"},
            request_checksum_calculation=calculation,
            response_checksum_validation=validation,
        )
        region = session.region_name or "us-east-1"  # of the user's profile, where there is one
        return session.client("s3", region_name=region, endpoint_url=endpoint, config=config, verify=bundle)

    try:
        return Clients(
            control=client(CONTROL_READ_TIMEOUT),
            data=client(DATA_READ_TIMEOUT),
            ranges=client(DATA_READ_TIMEOUT, validation="when_required"),
            parts=client(DATA_READ_TIMEOUT, PART_TRIES),
            sends_checksums=calculation == "when_supported",
        )
    except InvalidRegionError:
        raise InvalidSetting("AWS_REGION", "the name of a region, such as us-east-1") from None
    except ValueError:
        raise InvalidSetting(_endpoint_key(credentials), "http://host:port or https://host") from None


def _ca_bundle(credentials: Credentials, session: Any) -> str | None:
    """Return the file of certificates to trust, None for the system's. Raises InvalidSetting if it holds none."""
    key, bundle = "AWS_CA_BUNDLE", credentials.get("AWS_CA_BUNDLE")
    if not bundle:
        key, bundle = "ca_bundle of the AWS profile", session.get_scoped_config().get("ca_bundle")
    if bundle and (fault := certificates.fault_of(bundle)):
        raise InvalidSetting(key, fault)
    return bundle


def _transfer_config() -> TransferConfig:
    return TransferConfig(
        multipart_threshold=MULTIPART_BYTES,
        multipart_chunksize=PART_BYTES,
        max_request_concurrency=THREADS,
    )


class _Progress(BaseSubscriber):  # type: ignore[misc]
    def __init__(self, report: OnProgress) -> None:
        self._report = report

    def on_progress(self, bytes_transferred: int, **_: Any) -> None:
        self._report(bytes_transferred)


def _subscribers(on_progress: OnProgress | None) -> list[BaseSubscriber]:
    return [_Progress(on_progress)] if on_progress is not None else []
