"""A role's mounted Secret wins over the environment, and nothing of it is shown."""

from pathlib import Path

from finetune_api import names
from finetune_trainer.credentials import Credentials

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
    credentials = Credentials.for_role("wandb", {names.ENV_SECRETS_DIR: str(tmp_path)})
    assert credentials.get("WANDB_API_KEY") == "w"
    assert credentials.secret_field == "logging.wandb.secretRef"


def test_no_value_is_in_its_repr(tmp_path: Path) -> None:
    secret(tmp_path, "output", AWS_SECRET_ACCESS_KEY="CANARY")
    assert "CANARY" not in repr(Credentials.for_role("output", ENV, tmp_path))


def test_other_files_in_the_folder_are_no_keys(tmp_path: Path) -> None:
    secret(tmp_path, "output", **{"config.json": "{}", "AWS_REGION": "x"})
    assert dict(Credentials.for_role("output", {}, tmp_path).values) == {"AWS_REGION": "x"}
