"""A tracker is one file; whatever it raises is a warning without its secrets, and it hears how the run ended."""

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from finetune_api import constants
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.reporting import open_trackers
from finetune_trainer.reporting.metrics_log import MetricsLog
from finetune_trainer.reporting.tracker import Tracker
from finetune_trainer.reporting.trackers import TRACKERS
from finetune_trainer.settings import Environment, Ranks, Settings, load
from support.docs.markdown import ROOT, blocks
from support.trainer.process import job


class FailingTracker(Tracker):
    """Raises its password where `fails_in` says."""

    name, title, package, setting = "failing", "Failing", "json", "FAILING"
    fails_in = ""
    ends: list[bool]

    def configured(self) -> bool:
        return True

    def open(self) -> None:
        self._fail("open")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._fail("log")

    def close(self, succeeded: bool) -> None:
        self.ends.append(succeeded)
        self._fail("close")

    def secrets(self) -> list[str]:
        return ["pass/word"]

    def _fail(self, where: str) -> None:
        if where == self.fails_in:
            raise RuntimeError("refused pass/word at https://me:key@host\nmore")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load(job(tmp_path, tmp_path / "model"), [], Environment.from_env({}), Ranks())


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FailingTracker]]:
    monkeypatch.setitem(TRACKERS, "failing", FailingTracker)
    monkeypatch.setattr(FailingTracker, "ends", [], raising=False)
    yield FailingTracker


def warnings(settings: Settings, work: Path, error: type[BaseException] | None = None) -> list[tuple[Any, Any]]:
    """The warnings of a run of two logged steps, which ends with `error`."""
    with capture_logs() as logs, suppress(ValueError), ExitStack() as stack:
        metrics = MetricsLog(work / "metrics.jsonl", lambda step, values: None)
        metrics.open_trackers(settings, work, stack)
        metrics.log(1, {"loss": 1.0})
        metrics.log(2, {"loss": 0.9})
        if error:
            raise error
    return [(line["event"], line["error"]) for line in logs if line["log_level"] == "warning"]


@pytest.mark.parametrize(
    ("fails_in", "warning", "closed"),
    [
        ("open", "Failing failed to start; disabled for this run", []),
        ("log", "Failing failed; disabled for the rest of this run", [True]),
        ("close", "Failing failed to close", [True]),
    ],
)
def test_a_trackers_failure_is_one_warning_without_secrets(
    fails_in: str,
    warning: str,
    closed: list[bool],
    failing: type[FailingTracker],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(failing, "fails_in", fails_in)
    assert warnings(settings, tmp_path) == [(warning, "refused … at https://host")]
    assert failing.ends == closed


def test_a_tracker_hears_that_a_run_failed(failing: type[FailingTracker], settings: Settings, tmp_path: Path) -> None:
    assert warnings(settings, tmp_path, ValueError) == []
    assert failing.ends == [False]


def test_a_package_that_is_missing_is_named_with_the_setting(
    failing: type[FailingTracker], settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_trackers.check_trackers(settings)
    monkeypatch.setattr(failing, "package", "no_such_package")
    with pytest.raises(ConfigInvalid, match=r"^FAILING: the no_such_package package is not installed here$"):
        open_trackers.check_trackers(settings)


@pytest.mark.parametrize(
    "address", ["https://evil.example", "https://me:s3cret@evil.example/x.internal", "file:///s3cret", "databricks"]
)
def test_an_endpoint_that_the_administrator_does_not_allow_is_refused_by_the_rules_name(
    address: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TRACKERS["mlflow"], "package", "json")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    open_trackers.check_trackers(settings)
    monkeypatch.setenv(constants.ENV_ALLOWED_ENDPOINTS, "https://*.internal")
    with pytest.raises(ConfigInvalid, match=r"^MLFLOW_TRACKING_URI: .*allowedHubEndpoints\)$") as refused:
        open_trackers.check_trackers(settings)
    assert "s3cret" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:s3cret@mlflow.internal")
    open_trackers.check_trackers(settings)


def test_where_weights_and_biases_sends_to_is_told_to_its_client_and_checked(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = TRACKERS["wandb"](settings, tmp_path)
    assert tracker.endpoint() == "https://api.wandb.ai"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.evil.example")
    assert tracker.endpoint() == "https://wandb.evil.example"


def test_each_tracker_has_a_role_of_the_api(settings: Settings, tmp_path: Path) -> None:
    assert {name: each.name for name, each in TRACKERS.items()} == {name: name for name in ("wandb", "mlflow")}
    assert {each(settings, tmp_path).role for each in TRACKERS.values()} <= set(constants.SECRET_ROLES)


def test_what_mlflow_says_loses_its_password(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:pass/word@tracking")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    error = ValueError("at https://me:pass/word@tracking with t0ken, then postgresql://a:b@c/d\nmore")
    said = open_trackers.without_secrets(error, TRACKERS["mlflow"](settings, tmp_path).secrets())
    assert said == "at https://tracking with …, then postgresql://c/d"


def test_the_documented_tracker_gets_every_number(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [source] = blocks(ROOT / "docs" / "extending" / "tracker.md", "python")
    module: dict[str, Any] = {}
    exec(compile(source, "statsd.py", "exec"), module)
    monkeypatch.setitem(TRACKERS, "statsd", module["StatsdTracker"])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(10)
        monkeypatch.setenv("STATSD_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        open_trackers.check_trackers(settings)
        assert warnings(settings, tmp_path) == []
        assert [server.recv(100) for _ in range(2)] == [b"tiny.loss:1.0|g", b"tiny.loss:0.9|g"]
