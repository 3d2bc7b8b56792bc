"""Commands that take a job's name, given that of a trial that shares its FineTuneJob: it is named, not "not found"."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_api import answers, constants
from finetune_api.artifact_manifest import JobReference
from finetune_api.packed_jobs import trial_uid
from finetune_cli import published
from finetune_cli.app import app
from finetune_cli.client import FineTune, FineTuneError
from finetune_cli.errors import CliError
from finetune_cli.kube.client import Cluster
from finetune_cli.kube.packed import SharedJob
from support.simulation.sweep_world import TEMPLATE

typer_testing = pytest.importorskip("typer.testing")
ROWS = [
    {"name": "a", "phase": "Succeeded", "value": 0.25},
    {"name": "b", "phase": "Running", "step": 1200, "evalLoss": 0.5},
    {"name": "c", "phase": "Failed", "reason": "Diverged\u001b[2J", "step": 7},
]
SHARES = "nli-{0} is trial {0} of sweep nli, which shares FineTuneJob nli-pack-0 with others: "
LOG = [
    {"event": "Loading", "level": "info"},
    *({"event": f"Step {step}", "level": "info", "trial": name, "loss": "0.5"} for step in (1, 2) for name in "ab"),
]


def pack(outcome: str = "Unknown", rows: Any = ROWS, trials: Any = None) -> dict[str, Any]:
    named = trials or [{"name": name} for name in "abcd"]
    return {
        "metadata": {"name": "nli-pack-0", "namespace": "team", "uid": "u-1", "labels": {"finetune.dev/sweep": "nli"}},
        "spec": TEMPLATE | {"pack": {"sweep": "nli", "trials": named}},
        "status": {
            "phase": "Training",
            "trials": rows,
            "conditions": [
                {"type": "Succeeded", "status": outcome, "reason": "x", "lastTransitionTime": "2026-01-01T00:00:00Z"}
            ],
        },
    }


SWEEP = {
    "metadata": {"name": "more", "namespace": "team"},
    "spec": {"template": TEMPLATE, "parameters": [{"path": "lora.rank", "values": [4, 8]}]},
    "status": {"trials": [7, {"name": "r4", "phase": "Failed", "reason": "Deleted"}]},
}


class Packed(Cluster):
    """A cluster with one pack; nothing has the name of one of its trials."""

    found = pack()

    def __post_init__(self) -> None:
        pass

    def _get(self, name: str, kind: str) -> Any:
        if name != "nli-pack-0":
            raise CliError(f"there is no {kind} {name!r}", is_missing=True)
        return self.found

    def _list(self, kind: str = constants.KIND, **_: Any) -> Any:
        return answers.Listing({}, [self.found] if kind == constants.KIND else [SWEEP])

    def follow(self, name: str, *_: Any, **__: Any) -> Any:
        yield self.get(name)

    def pods(self, job: str) -> Any:
        running = {"name": constants.TRAINER_CONTAINER, "state": {"running": {}}}
        return [{"metadata": {"name": "pod", "uid": "p"}, "status": {"containerStatuses": [running]}}]

    def log(self, pod: str, **_: Any) -> Any:
        return map(json.dumps, LOG)


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> Packed:
    found = Packed(None, "team", "here", options=" -n team")
    monkeypatch.setattr("finetune_cli.kube.connect.connect", lambda *_: found)
    monkeypatch.setattr("finetune_cli.client.connect", lambda *_: found)
    monkeypatch.setattr("finetune_cli.kube.operators.Lookout", lambda _: SimpleNamespace(reason=lambda job: ""))
    return found


def run(*arguments: str) -> Any:
    return typer_testing.CliRunner().invoke(app, arguments)


@pytest.mark.parametrize(
    "command",
    [
        *(["status", "{}", "-o", "json"], ["watch", "{}", "-o", "yaml"], ["suspend", "{}"], ["resume", "{}"]),
        *(["delete", "{}", "--yes"], ["download", "{}", "x"], ["chat", "{}"], ["export", "{}", "x"], ["lineage", "{}"]),
        *(["promote", "{}", "--prefix", "s3://adapters/best"], ["serve-manifest", "{}"]),
    ],
    ids=lambda command: " ".join(command[:1]),
)
def test_what_cannot_be_done_to_one_trial_names_the_job_that_it_shares(
    command: list[str],
) -> None:
    result = run(*(word.format("nli-b") for word in command))
    assert isinstance(result.exception, SharedJob)
    assert result.exception.message == f"{SHARES.format('b')}Running, step 1,200, held-out loss 0.5000"
    assert "finetune status nli-pack-0 -n team shows that job" in result.exception.hint
    assert "finetune suspend nli --sweep -n team" in result.exception.hint


def test_its_status_is_its_row_and_the_job_that_it_shares() -> None:
    found = run("status", "nli-c")
    assert found.exit_code == 0
    assert found.stdout.startswith(f"{SHARES.format('c')}Failed (Diverged), step 7\n\nnli-pack-0  team  Training")
    assert "Pending" in run("status", "nli-d").stdout.splitlines()[0], "its trainer has told nothing of it"


def test_its_log_is_that_of_the_process_without_the_others() -> None:
    found = run("logs", "nli-b", "--raw")
    assert [json.loads(line) for line in found.stdout.splitlines()] == [
        line for line in LOG if line.get("trial") == "b"
    ]
    assert "Step 2" in run("logs", "nli-b", "--tail", "1").stdout and "Step 1" not in run(
        "logs", "nli-b", "--tail", "1"
    ).stdout.replace("Step 2", "")
    assert len(run("logs", "nli-pack-0", "--raw").stdout.splitlines()) == len(LOG)


def test_a_watch_ends_with_the_shared_job_and_as_the_trial(cluster: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packed, "found", pack("True"))
    assert run("watch", "nli-a").exit_code == 0
    with pytest.raises(CliError, match=r"trial c has published no adapter: Failed \(Diverged\), step 7"):
        raise run("watch", "nli-c").exception


def test_its_adapter_is_the_one_that_it_has_published(cluster: Packed) -> None:
    told = published.of_job(cluster, "nli-a")
    assert told == published.Told("s3://adapters/nli/a/", uid=trial_uid("u-1", "nli", "a"))
    for uid, differs in ((told.uid, False), ("another", True), (None, True)):
        manifest = SimpleNamespace(job=JobReference(uid=uid) if uid else None)
        assert bool(told.differs_from(published.Published("", None, manifest, b""))) == differs  # type: ignore[arg-type]


def test_it_is_compared_by_its_own_values() -> None:
    found = run("compare", "nli-b", "nli-c", "-o", "json")
    runs = json.loads(found.stdout)["runs"]
    assert [(each["name"], each["phase"]) for each in runs] == [("nli-b", "Running"), ("nli-c", "Failed")]


def test_the_client_says_so_too() -> None:
    with pytest.raises(FineTuneError, match="shares FineTuneJob nli-pack-0"):
        FineTune("team").get("nli-b")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("more-r4", "trial r4 of sweep more, and its FineTuneJob is gone: Failed (Deleted)"),
        ("more-r8", "trial r8 of sweep more, which has not started yet"),
    ],
)
def test_a_trial_that_has_no_job_now_is_none_that_does_not_exist(name: str, says: str) -> None:
    found = run("logs", name).exception
    assert isinstance(found, CliError) and found.message == f"{name} is {says}"
    assert found.hint == "finetune status --sweep more -n team shows all"


@pytest.mark.parametrize("spec", [None, 7, {"template": 7}, {"template": TEMPLATE, "trials": [[]]}])
def test_sweeps_that_cannot_be_read_hide_no_answer(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SWEEP, "spec", spec)
    monkeypatch.setitem(SWEEP, "status", {"trials": spec})
    assert "there is no FineTuneJob" in str(run("status", "more-r8").exception)


@pytest.mark.parametrize("name", ["more-r9", "more", "nli-e", "nli", "nli-pack-1", "other-a"])
def test_what_no_pack_holds_is_not_found(name: str) -> None:
    found = run("status", name)
    assert not isinstance(found.exception, SharedJob) and "there is no FineTuneJob" in str(found.exception)


@pytest.mark.parametrize("rows", [None, 7, [{"name": 7}], [[]], {"b": 1}])
@pytest.mark.parametrize("trials", [7, [7, {"name": "b"}], [{"name": ["b"]}, {"name": "b"}]])
def test_packs_that_somebody_made_of_something_else_break_nothing(
    rows: Any, trials: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Packed, "found", pack(rows=rows, trials=trials))
    found = run("status", "nli-b")
    assert found.exit_code == 0 or isinstance(found.exception, CliError), found.exception
