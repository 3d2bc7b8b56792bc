"""What libraries read from the environment: no configuration of a home directory, unless the user asks for it."""

import os
from pathlib import Path

import botocore.session
import pytest

from finetune_trainer.runtime import environment
from finetune_trainer.runtime.environment import set_compile_cache, set_defaults

PROFILE = "[default]\ncredential_process = /bin/false\naws_access_key_id = planted\naws_secret_access_key = planted\n"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    (tmp_path / ".aws").mkdir()
    for name in ("config", "credentials"):
        (tmp_path / ".aws" / name).write_text(PROFILE)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def _apply(monkeypatch: pytest.MonkeyPatch, scratch: Path) -> None:
    env = dict(os.environ)
    set_defaults(scratch, env)
    for name, value in env.items():
        monkeypatch.setenv(name, value)


def test_a_profile_that_was_planted_in_the_home_directory_is_not_read(home: Path, monkeypatch, tmp_path: Path) -> None:
    assert botocore.session.Session().get_credentials().access_key == "planted", "the attack works"
    _apply(monkeypatch, tmp_path)
    assert botocore.session.Session().get_credentials() is None


def test_a_profile_that_the_user_names_is_read(home: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_PROFILE", "default")
    _apply(monkeypatch, tmp_path)
    assert botocore.session.Session().get_credentials().access_key == "planted"


def test_workload_identity_needs_no_file_and_no_metadata_service(home: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/trainer")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    _apply(monkeypatch, tmp_path)
    found = (
        botocore.session.Session().get_component("credential_provider").get_provider("assume-role-with-web-identity")
    )
    assert found.load().method == "assume-role-with-web-identity"


def test_what_the_user_sets_stays_and_caches_leave_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    env = {"HOME": nowhere, "AWS_EC2_METADATA_DISABLED": "false", "MPLCONFIGDIR": "/x"}
    set_defaults(Path("/scratch"), env)
    assert (env["AWS_EC2_METADATA_DISABLED"], env["MPLCONFIGDIR"]) == ("false", "/x")
    assert env["XDG_CACHE_HOME"] == "/scratch/.cache"
    assert not [name for name, value in env.items() if value.startswith(nowhere) and name != "HOME"]


def test_caches_stay_in_a_home_that_can_be_written(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    set_defaults(Path("/scratch"), env)
    assert "XDG_CACHE_HOME" not in env


def test_what_is_compiled_is_kept_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def kept(**env: str) -> dict[str, str]:
        set_compile_cache(tmp_path, env)
        return env

    found = kept(TRITON_CACHE_DIR="/mine")
    inductor = Path(found["TORCHINDUCTOR_CACHE_DIR"])
    assert (inductor.name, inductor.parent.parent) == ("inductor", tmp_path)
    assert found["TRITON_CACHE_DIR"] == "/mine"
    assert kept()["TORCHINDUCTOR_CACHE_DIR"] == str(inductor), "as long as the engine is the same"

    (tmp_path / "engine").mkdir()
    (tmp_path / "engine/compilation.py").write_text("another version")
    monkeypatch.setattr(environment, "_COMPILED", (tmp_path / "engine",))
    assert Path(kept()["TORCHINDUCTOR_CACHE_DIR"]).parent != inductor.parent


def test_a_cache_that_cannot_be_written_stops_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch makes the directory while it is imported, and cannot be imported if that fails."""
    env: dict[str, str] = {}
    (tmp_path / "file").write_text("")
    set_compile_cache(tmp_path / "file", env)
    monkeypatch.setattr(environment.os, "access", lambda *args: False)
    set_compile_cache(tmp_path / "read-only", env)
    assert env == {}
    assert capsys.readouterr().out.count("Compiled kernels are not kept for later runs") == 2
