"""A role's mounted Secret wins over the environment, and nothing of it is shown."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune_api import constants
from finetune_trainer.errors import failure_of
from finetune_trainer.redact import redacted
from finetune_trainer.stores.credentials import Credentials, origin
from finetune_trainer.stores.errors import StoreMisconfigured

ENV = {"AWS_ACCESS_KEY_ID": "env-id", "AWS_SECRET_ACCESS_KEY": "env-secret", "AWS_SESSION_TOKEN": "env-token"}


def secret(folder: Path, role: str, **values: str) -> Path:
    """As the kubelet mounts a Secret: files are links into a hidden folder."""
    hidden = folder / role / "..2026_01_01"
    hidden.mkdir(parents=True)
    (folder / role / "..data").symlink_to(hidden.name)
    for key, value in values.items():
        (hidden / key).write_text(value)
        (folder / role / key).symlink_to(f"..data/{key}")
    return folder


def test_the_environment_serves_when_there_is_no_secret(tmp_path: Path) -> None:
    credentials = Credentials.for_role("output", ENV, tmp_path)
    assert credentials.get("AWS_ACCESS_KEY_ID") == "env-id"
    assert credentials.get("AWS_REGION", "us-east-1") == "us-east-1"


def test_outside_a_pod_messages_name_the_environment_alone() -> None:
    credentials = Credentials.from_environment("model", ENV | {"HF_TOKEN": "token\n"})
    assert (credentials.where, credentials.get("HF_TOKEN")) == ("in the environment", "token")
    assert Credentials("model").where == "in the Secret named by model.secretRef or in the environment"


def test_the_secret_wins_key_by_key(tmp_path: Path) -> None:
    secret(tmp_path, "output", AWS_REGION="eu-west-1\n")
    credentials = Credentials.for_role("output", ENV | {"AWS_REGION": "us-west-2"}, tmp_path)
    assert (credentials.get("AWS_REGION"), credentials.get("AWS_ACCESS_KEY_ID")) == ("eu-west-1", "env-id")


def test_an_identity_is_never_mixed_from_two_places(tmp_path: Path) -> None:
    secret(tmp_path, "output", AWS_ACCESS_KEY_ID="mine", AWS_SECRET_ACCESS_KEY="mine-too")
    credentials = Credentials.for_role("output", ENV, tmp_path)
    assert credentials.get("AWS_ACCESS_KEY_ID") == "mine"
    assert credentials.get("AWS_SESSION_TOKEN") is None


def test_roles_do_not_see_each_others_secrets(tmp_path: Path) -> None:
    secret(tmp_path, "model", HF_TOKEN="hf_model")
    secret(tmp_path, "output", AWS_ACCESS_KEY_ID="a", AWS_SECRET_ACCESS_KEY="b")
    assert Credentials.for_role("model", {}, tmp_path).get("HF_TOKEN") == "hf_model"
    assert Credentials.for_role("output", {}, tmp_path).get("HF_TOKEN") is None


def test_the_folder_comes_from_the_environment(tmp_path: Path) -> None:
    secret(tmp_path, "wandb", WANDB_API_KEY="w")
    credentials = Credentials.for_role("wandb", {constants.ENV_SECRETS_DIR: str(tmp_path)})
    assert credentials.get("WANDB_API_KEY") == "w"
    assert credentials.secret_field == "logging.wandb.secretRef"


def test_no_value_is_in_its_repr(tmp_path: Path) -> None:
    secret(tmp_path, "output", AWS_SECRET_ACCESS_KEY="CANARY")
    assert "CANARY" not in repr(Credentials.for_role("output", ENV, tmp_path))


def test_other_files_in_the_folder_are_no_keys(tmp_path: Path) -> None:
    secret(tmp_path, "output", **{"config.json": "{}", "AWS_REGION": "x"})
    assert dict(Credentials.for_role("output", {}, tmp_path).values) == {"AWS_REGION": "x"}


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://s3.example.com", "https://s3.example.com"),
        ("HTTP://S3.example.com:9000/minio/?a=b#c", "http://s3.example.com:9000"),
        ("http://me:CANARY@minio.data.svc:9000", "http://minio.data.svc:9000"),
        ("http://CANARY@[::1]:9000/", "http://[::1]:9000"),
    ],
)
def test_of_a_url_only_the_origin_is_shown(url: str, shown: str) -> None:
    assert origin(url) == shown


@pytest.mark.parametrize(
    "value", ["", "CANARY", "s3://CANARY", "http://", "http://a b", "http://a:CANARY", "http://[a"]
)
def test_what_is_no_url_is_not_echoed(value: str) -> None:
    with pytest.raises(ValueError) as caught:
        origin(value)
    assert "CANARY" not in str(caught.value)


def test_passwords_in_other_peoples_texts_are_cut_out() -> None:
    text = "Failed: http://me:CANARY@host:1/x and 'https://CANARY@other', mail me@host"
    assert redacted(text) == "Failed: http://host:1/x and 'https://other', mail me@host"
    assert failure_of(RuntimeError(text)).message.startswith("Unexpected RuntimeError: Failed: http://host:1/x and ")


def test_no_log_line_holds_a_password(tmp_path: Path) -> None:
    program = """
import structlog
from pathlib import Path
from finetune_trainer.reporting import logs
logs.configure()
logs.copy_to(Path("log.txt"))
try:
    raise ValueError("no route to http://me:CANARY@tracker:5000")
except ValueError as error:
    structlog.get_logger().warning("MLflow failed", error=str(error), exc_info=True)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    for text in (done.stderr, (tmp_path / "log.txt").read_text()):
        assert "Traceback" in text
        assert text.count("http://tracker:5000") == 2
        assert "CANARY" not in text


@pytest.mark.parametrize("value", ["hf_CANARY\nx", "hf_CANARY\r\nX-Other: 1", "hf_CANARY x", "CANARYé", "\0CANARY"])
@pytest.mark.parametrize("key", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_TOKEN"])
def test_a_value_that_no_header_can_carry_is_refused_by_its_key(key: str, value: str) -> None:
    sentence = rf"^{key} must be one line of visible ASCII .* \(in the Secret named by model\.secretRef or in the env"
    with pytest.raises(StoreMisconfigured, match=sentence) as caught:
        Credentials("model", {key: value}).get(key)
    assert "CANARY" not in str(caught.value)
    assert Credentials("model", {key: "\n hf_CANARY \n"}).get(key) == "hf_CANARY", "space around it goes"


def test_a_password_may_hold_any_visible_character() -> None:
    credentials = Credentials("output", {"MLFLOW_TRACKING_PASSWORD": "pass wörd", "MLFLOW_TRACKING_USERNAME": "a\nb"})
    assert credentials.get("MLFLOW_TRACKING_PASSWORD") == "pass wörd"
    with pytest.raises(StoreMisconfigured, match="MLFLOW_TRACKING_USERNAME"):
        credentials.get("MLFLOW_TRACKING_USERNAME")
