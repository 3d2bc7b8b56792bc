"""What an S3 store says of keys, endpoints and outages, and how it checks what it has sent."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_api import constants
from finetune_api.uri import parse
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import digest_file
from finetune_trainer.stores.errors import (
    BucketNotFound,
    StoreAccessDenied,
    StoreMisconfigured,
    StoreUnavailable,
)
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.s3 import client as s3_client
from finetune_trainer.stores.s3 import retry
from support.stores.fault_proxy import Fault, Faults, faulty
from support.stores.s3 import S3Server, rclone_server, s3_store

BIG = s3_client.MULTIPART_BYTES + s3_client.PART_BYTES + 12345


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with rclone_server(tmp_path_factory.mktemp("rclone")) as server:
        yield server


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(1 << 20) * (BIG >> 20) + os.urandom(BIG % (1 << 20)))
    return path


def test_a_large_object_carries_a_checksum_the_server_computed(s3: S3Server, bucket: str, big_file: Path) -> None:
    s3_store(s3, bucket).upload(big_file, "big.bin")
    head = s3.client().head_object(Bucket=bucket, Key="some/prefix/big.bin", ChecksumMode="ENABLED")
    assert (head["ChecksumType"], head["ChecksumCRC32"]) == ("FULL_OBJECT", digest_file(big_file).crc32_base64)
    assert head["ETag"].strip('"').endswith(f"-{-(-BIG // s3_client.PART_BYTES)}"), "it went in parallel parts"


def test_checksums_can_be_turned_off_for_servers_that_know_none(s3: S3Server, bucket: str, big_file: Path) -> None:
    store = s3_store(s3, bucket, AWS_REQUEST_CHECKSUM_CALCULATION="when_required")
    store.upload(big_file, "big.bin")
    assert store.digest("big.bin") == digest_file(big_file)


@pytest.mark.parametrize("kind", ["wrong upload", "short upload"])
def test_changed_bytes_do_not_pass_where_the_server_knows_no_checksums(
    rclone: S3Server, big_file: Path, kind: Fault
) -> None:
    faults = Faults(rate=1, kinds=(kind,), only=lambda request: request.method == "PUT" and faults.total == 0)
    with faulty(rclone.endpoint, faults) as endpoint:
        bucket = rclone.make_bucket()
        s3_store(rclone, bucket, AWS_ENDPOINT_URL=endpoint).upload(big_file, "big.bin")
    assert faults.total == 1
    assert s3_store(rclone, bucket).digest("big.bin") == digest_file(big_file)


def test_a_missing_bucket_is_an_error_in_the_manifest(s3: S3Server, tmp_path: Path) -> None:
    store = s3_store(s3, "no-such-bucket")
    sentence = f"output.uri: bucket no-such-bucket does not exist at {s3.endpoint}: create it or change the URI"
    (tmp_path / "file").write_bytes(b"x")
    for touch in (
        store.list,
        lambda: store.exists("x"),
        lambda: store.size("x"),
        lambda: store.read_bytes("x"),
        lambda: store.write_bytes("x", b""),
        lambda: store.upload(tmp_path / "file", "x"),
        lambda: store.download("x", tmp_path / "x"),
    ):
        with pytest.raises(BucketNotFound) as caught:
            touch()
        assert str(caught.value) == sentence


@pytest.mark.parametrize("wrong", ["access", "secret"])
def test_wrong_keys_are_denied_and_never_shown(s3: S3Server, bucket: str, wrong: str) -> None:
    key = {"access": "AWS_ACCESS_KEY_ID", "secret": "AWS_SECRET_ACCESS_KEY"}[wrong]
    store = s3_store(s3, bucket, **{key: "CANARY-VALUE"})
    for touch in (store.list, lambda: store.exists("x"), lambda: store.write_bytes("x", b"y")):
        with pytest.raises(
            StoreAccessDenied, match=r"check the keys in the Secret named by output\.secretRef"
        ) as caught:
            touch()
        assert "CANARY" not in str(caught.value) and "CANARY" not in repr(caught.value.__cause__)


def test_keys_that_may_only_read_are_told_so_when_writing(s3: S3Server, bucket: str) -> None:
    keys = s3.add_user({"Effect": "Allow", "Action": ["s3:ListBucket", "s3:GetObject"], "Resource": "*"})
    store = s3_store(s3, bucket, **keys.env)
    assert store.list() == []
    with pytest.raises(StoreAccessDenied, match="AccessDenied"):
        store.write_bytes("x", b"y")


def test_missing_keys_are_told_where_to_put_them(s3: S3Server, bucket: str, monkeypatch, tmp_path: Path) -> None:
    for key in [key for key in os.environ if key.startswith("AWS_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store = open_store(parse(f"s3://{bucket}/x"), Credentials("output", s3.settings))
    sentence = (
        r"no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the Secret named by output\.secretRef"
    )
    with pytest.raises(StoreAccessDenied, match=sentence):
        store.list()


def test_half_a_pair_of_keys_is_told_like_none(s3: S3Server, bucket: str) -> None:
    env = {key: value for key, value in s3.env.items() if key != "AWS_SECRET_ACCESS_KEY"}
    with pytest.raises(StoreAccessDenied, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_store(parse(f"s3://{bucket}/x"), Credentials("output", env)).list()


IMPATIENT = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", constants.ENV_STORE_PATIENCE: "0"}


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_a_store_that_cannot_be_reached_is_unavailable(endpoint: str) -> None:
    store = open_store(parse("s3://bucket/x"), Credentials("output", IMPATIENT | {"AWS_ENDPOINT_URL": endpoint}))
    with pytest.raises(StoreUnavailable, match=r"output\.uri: s3://bucket/x") as caught:
        store.list()
    assert f"at {endpoint}: cannot connect: check the endpoint, DNS and NetworkPolicies" in str(caught.value)


#: Settings with CANARY in them, and what is said of each.
UNUSABLE = [
    ("AWS_ENDPOINT_URL", "CANARY/K7MDENG/bPxRfiCY", "http://host:port or https://host"),
    ("AWS_ENDPOINT_URL_S3", "CANARY", "http://host:port or https://host"),
    ("AWS_ENDPOINT_URL", "http://CANARY host", "http://host:port or https://host"),
    ("AWS_ENDPOINT_URL", "http://host:CANARY", "http://host:port or https://host"),
    ("AWS_ENDPOINT_URL", "http://[CANARY", "http://host:port or https://host"),
    ("AWS_ENDPOINT_URL", "ftp://CANARY", "http://host:port or https://host"),
    ("AWS_REGION", "CANARY/x y", "the name of a region, such as us-east-1"),
    ("AWS_CA_BUNDLE", "/nowhere/CANARY", "the path of a file with certificates in PEM"),
    ("AWS_REQUEST_CHECKSUM_CALCULATION", "CANARY", "when_supported or when_required"),
    (constants.ENV_STORE_PATIENCE, "CANARY", "a number of seconds"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), UNUSABLE)
@pytest.mark.parametrize("endpoints", ["", "https://*"])
def test_a_setting_that_cannot_work_is_named_and_its_value_never_shown(
    key: str, value: str, allowed: str, endpoints: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a secret key that was put under the wrong name."""
    monkeypatch.setenv(constants.ENV_ALLOWED_S3_ENDPOINTS, endpoints)
    env = IMPATIENT | {"AWS_ENDPOINT_URL": "https://127.0.0.1:9"} | {key: value}
    with pytest.raises(StoreMisconfigured) as caught:
        open_store(parse("s3://bucket/x"), Credentials("output", env)).list()
    expected = f"output.uri: {key} must be {allowed} (in the Secret named by output.secretRef or in the environment)"
    assert str(caught.value) == expected


def test_a_file_of_certificates_that_is_not_there_is_named_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing, other = tmp_path / "ca.crt", tmp_path / "other.pem"
    other.write_text("no certificate")
    (tmp_path / "config").write_text(f"[default]\nca_bundle = {other}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    env = IMPATIENT | {"AWS_ENDPOINT_URL": "https://127.0.0.1:9"}
    must = "must be the path of a file with certificates in PEM: "
    with pytest.raises(StoreMisconfigured, match=f"AWS_CA_BUNDLE {must}{missing} does not exist"):
        open_store(parse("s3://bucket/x"), Credentials("output", env | {"AWS_CA_BUNDLE": str(missing)})).list()
    with pytest.raises(StoreMisconfigured, match=f"ca_bundle of the AWS profile {must}{other} has none"):
        open_store(parse("s3://bucket/x"), Credentials("output", env)).list()


@pytest.mark.parametrize("url", ["user:CANARY@127.0.0.1:9", "CANARY@127.0.0.1:9", "127.0.0.1:9/?token=CANARY"])
def test_a_password_in_the_endpoint_is_not_shown(url: str) -> None:
    store = open_store(parse("s3://bucket/x"), Credentials("output", IMPATIENT | {"AWS_ENDPOINT_URL": f"http://{url}"}))
    with pytest.raises(StoreUnavailable) as caught:
        store.list()
    assert str(caught.value).startswith("output.uri: s3://bucket/x at http://127.0.0.1:9: ")
    assert "CANARY" not in str(caught.value)


def test_a_store_that_never_answers_is_unavailable(monkeypatch) -> None:
    monkeypatch.setattr(s3_client, "CONTROL_READ_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        store = open_store(parse("s3://bucket/x"), Credentials("output", IMPATIENT | {"AWS_ENDPOINT_URL": endpoint}))
        with pytest.raises(StoreUnavailable, match="no answer in time"):
            store.list()


@pytest.mark.parametrize("seconds", [s3_client.CONNECT_TIMEOUT, s3_client.CONTROL_READ_TIMEOUT])
def test_the_time_to_report_an_unreachable_store_is_well_under_a_minute(seconds: float) -> None:
    last_try = retry.OUTAGE_SECONDS + retry.MAX_WAIT  # begins before, after the longest wait
    assert last_try + seconds <= 45


@pytest.mark.parametrize("fault", ["500", "503", "reset"])
def test_a_short_outage_is_sat_out(s3: S3Server, bucket: str, fault: Fault, monkeypatch) -> None:
    monkeypatch.setattr(retry, "MAX_WAIT", 0.2)
    faults = Faults(rate=1, kinds=(fault,))
    faults.only = lambda request: faults.total < 5
    with faulty(s3.endpoint, faults) as endpoint:
        s3_store(s3, bucket, AWS_ENDPOINT_URL=endpoint).write_bytes("x", b"y")
    assert faults.total == 5
    assert s3_store(s3, bucket).read_bytes("x") == b"y"


def test_parts_left_by_a_killed_upload_are_cleared_by_the_next(s3: S3Server, bucket: str, big_file: Path) -> None:
    client = s3.client()
    for key in ("some/prefix/big.bin", "some/prefix/big.bin.other"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    s3_store(s3, bucket).upload(big_file, "big.bin")
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["some/prefix/big.bin.other"], "not ours to touch"


def test_a_full_local_disk_is_said(s3: S3Server, bucket: str) -> None:
    store = s3_store(s3, bucket)
    store.write_bytes("x", b"y")
    with pytest.raises(StoreUnavailable, match=r"output\.uri: s3://.*/x at .* cannot be written to /proc"):
        store.download("x", Path("/proc/no-such-place/x"))


def test_an_endpoint_outside_the_administrators_list_is_refused_before_anything_is_sent(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.make_bucket()
    monkeypatch.setenv(constants.ENV_ALLOWED_S3_ENDPOINTS, "https://s3.example.com, https://*.internal")
    with pytest.raises(StoreMisconfigured, match=r"not allowed here; allowed: .*policy.allowedS3Endpoints"):
        s3_store(s3, bucket).exists("a")
    secret = {constants.ENV_ALLOWED_S3_ENDPOINTS: "*"}
    with pytest.raises(StoreMisconfigured):
        s3_store(s3, bucket, **secret).exists("a")
    for trick in (
        "https://evil.example/x.internal",
        "https://evil.example#.internal",
        "https://a.internal@evil.example",
    ):
        with pytest.raises(StoreMisconfigured, match=r"at https://evil\.example: this endpoint is not allowed here"):
            s3_store(s3, bucket, AWS_ENDPOINT_URL=trick).exists("a")
    monkeypatch.setenv(constants.ENV_ALLOWED_S3_ENDPOINTS, "http://127.0.0.1:*/")
    assert not s3_store(s3, bucket).exists("a")
