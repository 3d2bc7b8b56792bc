"""Reading published adapters from S3 or a folder, with the user's own credentials. Nothing here writes to a store."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_api import uri
from finetune_cli.errors import CliError, Exit

CHUNK_BYTES = 1 << 20
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "403", "401")
_MISSING = ("NoSuchKey", "NotFound", "404")


class Remote(ABC):
    """What lies below one URI."""

    def __init__(self, root: uri.Uri) -> None:
        self.root = root

    @abstractmethod
    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """The bytes of a file from offset `start`. Raises CliError, Missing where there is no such file."""

    def read(self, path: str) -> bytes:
        """A small file as a whole."""
        return b"".join(self.stream(path))


class MissingError(CliError):
    """There is no such file."""


class Folder(Remote):
    """file://"""

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        local = Path(self.root.path) / path
        try:
            with local.open("rb") as file:
                file.seek(start)
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
        except (FileNotFoundError, NotADirectoryError):
            raise MissingError(f"{self.root.join(path)} does not exist") from None
        except OSError as error:
            raise CliError(f"{self.root.join(path)}: cannot be read: {error.strerror}", code=Exit.UNREACHABLE) from None


class Bucket(Remote):
    """s3://, with boto3's usual credentials: environment, profile, instance role."""

    def __init__(self, root: uri.Uri, *, seconds: float = 60, tries: int = 3) -> None:
        super().__init__(root)
        try:
            import boto3
            from botocore.config import Config
        except ImportError:
            raise CliError("boto3 is not installed here", hint="pip install 'finetune-operator[cli]'") from None
        self.endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        with self._explained(""):
            session = boto3.session.Session()
            self._client: Any = session.client(
                "s3",
                region_name=session.region_name or os.environ.get("AWS_REGION") or "us-east-1",
                endpoint_url=self.endpoint,
                config=Config(
                    connect_timeout=min(5, seconds),
                    read_timeout=seconds,
                    retries={"mode": "standard", "total_max_attempts": tries},
                    # Servers of one's own seldom have a DNS name for every bucket.
                    s3={"addressing_style": "path" if self.endpoint else "auto"},
                ),
            )

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        span: Any = {"Range": f"bytes={start}-"} if start else {}
        with self._explained(path):
            key = "/".join(part for part in (self.root.path.strip("/"), path) if part)
            answer = self._client.get_object(Bucket=self.root.authority, Key=key, **span)
            yield from answer["Body"].iter_chunks(CHUNK_BYTES)

    @contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        from botocore import exceptions as boto
        from urllib3.exceptions import HTTPError

        what = f"{self.root.join(path) if path else self.root} at {self.endpoint or 'Amazon S3'}"
        try:
            yield
        except boto.ClientError as error:
            raise self._refusal(str(error.response.get("Error", {}).get("Code", "")), what) from None
        except ValueError:
            raise CliError(
                f"AWS_ENDPOINT_URL: {self.endpoint!r} is no URL", hint="for example https://s3.example.com"
            ) from None
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.ProfileNotFound) as error:
            raise CliError(
                f"{what}: no credentials: {error}",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_ENDPOINT_URL), or AWS_PROFILE",
                code=Exit.UNREACHABLE,
            ) from None
        except (boto.BotoCoreError, HTTPError) as error:
            raise CliError(
                f"{what}: the store is out of reach ({type(error).__name__})",
                hint="check AWS_ENDPOINT_URL and the network",
                code=Exit.UNREACHABLE,
                may_pass=True,
            ) from None

    def _refusal(self, code: str, what: str) -> CliError:
        if code == "NoSuchBucket":
            return CliError(f"{what}: bucket {self.root.authority} does not exist", hint="is AWS_ENDPOINT_URL right?")
        if code in _MISSING:
            return MissingError(f"{what} does not exist")
        if code in _DENIED:
            return CliError(
                f"{what}: the store refuses you ({code})",
                hint="check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and what they may read",
                code=Exit.UNREACHABLE,
            )
        return CliError(f"{what}: the store answered {code or 'an error'}", code=Exit.UNREACHABLE, may_pass=True)


def open_remote(address: str, *, seconds: float = 60, tries: int = 3) -> Remote:
    """What lies below `address`. `seconds` bounds the wait for an answer. Raises CliError."""
    try:
        root = uri.parse(address, uri.WRITABLE)
    except ValueError as error:
        raise CliError(f"{uri.redacted(address)}: {error}") from None
    if root.scheme == "pvc":
        raise CliError(
            f"{address} is a volume in the cluster, which cannot be read from here",
            hint="mount it in a pod and use kubectl cp, or publish to s3://",
        )
    return Folder(root) if root.scheme == "file" else Bucket(root, seconds=seconds, tries=tries)
