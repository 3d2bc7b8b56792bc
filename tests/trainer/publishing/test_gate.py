"""publish.onlyIf compares what can be compared, with an adapter that is what it says; it never guesses."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from finetune_api import constants
from finetune_api.artifact_manifest import Lineage
from finetune_api.gate import GateCheck, candidate_folder
from finetune_api.latest import LATEST_FILE, Latest, Promotion
from finetune_api.manifest import load_file
from finetune_api.spec import Metadata
from finetune_api.status import Adapter
from finetune_api.uri import parse
from finetune_trainer.errors import ConfigInvalid
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.gate import check_gate, judge, verdict
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.settings import Environment, Ranks, Settings
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.signature import SigningKey
from support.trainer.process import job

ROWS, PROMPTS = f"sha256:{'a' * 64}", f"sha256:{'b' * 64}"
MINE = Lineage(eval_rows=ROWS, eval_prompts=PROMPTS)


def put(folder: Path, key: SigningKey | None = None, lineage: Lineage | None = MINE, **metrics: float) -> Adapter:
    made = folder.parent / f"made-{folder.name}"
    made.mkdir(parents=True)
    (made / constants.ADAPTER_CONFIG_FILE).write_text("{}")
    (made / constants.ADAPTER_WEIGHTS_FILE).write_bytes(b"weights" * 100)
    store = open_store(parse(f"file://{folder}"), Credentials("output", {}))
    bundle = Bundle(made, ARTIFACTS["Adapter"], "org/base", 8, metrics, lineage=lineage)
    return AdapterOutput(store, Metadata(name="nli"), key=key).publish(bundle)


def settings_for(folder: Path, *conditions: dict[str, Any]) -> Settings:
    changes = {"publish.onlyIf": list(conditions), "evaluation.metrics": ["loss", "nli"]}
    manifest = load_file(job(folder / "job", folder / "model", changes))
    return Settings(manifest, Environment.from_env(os.environ), Ranks())


def beats(folder: Path, other: Path, metric: str = "evalLoss") -> GateCheck:
    asked = settings_for(folder, {"metric": metric, "betterThan": f"file://{other}"})
    return judge(asked, {"evalLoss": 0.4, "f1": 0.9}, MINE)[0]


@pytest.mark.parametrize(
    ("asked", "passes", "told"),
    [
        ({"metric": "f1", "atLeast": 0.9}, True, ""),
        ({"metric": "f1", "atLeast": 0.91}, False, "f1 0.9, at least 0.91 is asked"),
        ({"metric": "evalLoss", "atMost": 0.4}, True, ""),
        ({"metric": "evalLoss", "atMost": 0.39}, False, "evalLoss 0.4, at most 0.39 is asked"),
        ({"metric": "recall", "atLeast": 0.0}, False, "recall not measured, at least 0 is asked"),
    ],
)
def test_a_number_to_reach(tmp_path: Path, asked: dict[str, Any], passes: bool, told: str) -> None:
    checks = judge(settings_for(tmp_path, asked), {"evalLoss": 0.4, "f1": 0.9}, MINE)
    assert ([each.passed for each in checks], verdict(checks)) == ([passes], told)


@pytest.mark.parametrize(
    ("metric", "theirs", "passes"),
    [
        ("evalLoss", 0.5, True),
        ("evalLoss", 0.4, False),
        ("evalLoss", 0.3, False),
        ("f1", 0.8, True),
        ("f1", 0.9, False),
    ],
)
def test_an_adapter_to_beat(tmp_path: Path, metric: str, theirs: float, passes: bool) -> None:
    other = put(tmp_path / "other", **{metric: theirs})
    check = beats(tmp_path, tmp_path / "other", metric)
    assert (check.passed, check.bar, check.other_digest) == (passes, theirs, other.manifest_digest)
    assert check.problem is None
    assert f"better than {theirs:g} is asked (file://{tmp_path}/other)" in check.told


@pytest.mark.parametrize(
    ("lineage", "metric", "sentence"),
    [
        (Lineage(eval_rows=f"sha256:{'c' * 64}", eval_prompts=PROMPTS), "evalLoss", "is of other held-out rows"),
        (Lineage(eval_rows=f"sha256:{'c' * 64}", eval_prompts=PROMPTS), "f1", "is of other held-out rows"),
        (Lineage(eval_rows=ROWS, eval_prompts=f"sha256:{'c' * 64}"), "f1", "with other prompts or settings"),
        (Lineage(eval_rows=ROWS), "f1", "with other prompts or settings (not recorded"),
        (None, "evalLoss", "is of other held-out rows (not recorded"),
        (MINE, "recall", "its manifest records no recall"),
    ],
)
def test_what_was_measured_otherwise_is_refused_before_training(
    tmp_path: Path, lineage: Lineage | None, metric: str, sentence: str
) -> None:
    put(tmp_path / "other", lineage=lineage, evalLoss=0.5, f1=0.5)
    assert sentence in (beats(tmp_path, tmp_path / "other", metric).problem or "")
    asked = settings_for(tmp_path, {"metric": metric, "betterThan": f"file://{tmp_path}/other"})
    with pytest.raises(ConfigInvalid, match=r"spec\.publish\.onlyIf\[0\]\.betterThan: file://.*: its ") as refusal:
        check_gate(asked, MINE)
    assert sentence in str(refusal.value)


def test_other_prompts_do_not_matter_to_the_loss(tmp_path: Path) -> None:
    put(tmp_path / "other", lineage=Lineage(eval_rows=ROWS), evalLoss=0.5)
    assert beats(tmp_path, tmp_path / "other").passed


def test_an_adapter_that_is_not_what_its_manifest_says_is_no_bar(tmp_path: Path) -> None:
    put(tmp_path / "other", evalLoss=9.0)
    (tmp_path / "other" / constants.ADAPTER_WEIGHTS_FILE).write_bytes(b"poor weights")
    assert "the manifest says" in (beats(tmp_path, tmp_path / "other").problem or "")
    assert "there is no adapter to beat" in (beats(tmp_path, tmp_path / "nothing").problem or "")


def test_a_forged_metric_is_no_bar_where_a_key_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = Ed25519PrivateKey.generate()
    public = private.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    monkeypatch.setenv(constants.ENV_PUBLIC_KEY, public.decode())
    put(tmp_path / "signed", SigningKey(private), evalLoss=0.5)
    assert beats(tmp_path, tmp_path / "signed").passed
    manifest = tmp_path / "signed" / constants.MANIFEST_FILE
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"metrics": {"evalLoss": 9.0}}))
    assert "is not signed with the key" in (beats(tmp_path, tmp_path / "signed").problem or "")


def test_a_pointer_is_followed_and_read_anew_at_the_end(tmp_path: Path) -> None:
    first = put(tmp_path / "nli/one", evalLoss=0.5)
    second = put(tmp_path / "nli/two", evalLoss=0.3)

    def point(path: str, adapter: Adapter) -> None:
        named = Promotion(path=path, manifest_digest=adapter.manifest_digest, promoted_at="2026-01-01T00:00:00Z")  # type: ignore[arg-type]
        (tmp_path / "nli" / LATEST_FILE).write_bytes(Latest(current=named).to_bytes())

    point("one", first)
    asked = settings_for(tmp_path, {"metric": "evalLoss", "betterThan": f"file://{tmp_path}/nli"})
    check_gate(asked, MINE)
    assert beats(tmp_path, tmp_path / "nli").passed
    point("two", second)
    assert not beats(tmp_path, tmp_path / "nli").passed
    point("two", first)
    assert "was promoted" in (beats(tmp_path, tmp_path / "nli").problem or "")


@pytest.mark.parametrize(("other", "told"), [("nli", "latest.json names this job's"), ("nli/one", "it is this job's")])
def test_an_adapter_that_readers_have_is_not_replaced_by_the_one_that_beats_it(
    tmp_path: Path, other: str, told: str
) -> None:
    asked = settings_for(tmp_path, {"metric": "evalLoss", "betterThan": f"file://{tmp_path}/{other}"})
    named = put(tmp_path / "nli/one", evalLoss=0.5)
    entry = Promotion(path="one", manifest_digest=named.manifest_digest, promoted_at="2026-01-01T00:00:00Z")  # type: ignore[arg-type]
    (tmp_path / "nli" / LATEST_FILE).write_bytes(Latest(current=entry).to_bytes())
    output = asked.spec.output.model_copy(update={"uri": f"file://{tmp_path}/nli/one/", "overwrite": True})
    spec = asked.spec.model_copy(update={"output": output})
    asked = replace(asked, job=asked.job.model_copy(update={"spec": spec}))
    with pytest.raises(ConfigInvalid, match=f"{told} own output"):
        check_gate(asked, MINE)


@pytest.mark.parametrize("uid", [None, "", "0f3c-9a", "../../x", "a/b\x1b", "é" * 9])
def test_a_candidate_lies_below_the_output(uid: str | None) -> None:
    assert candidate_folder("nli", uid).startswith("candidates/nli")
    assert candidate_folder("nli", uid).count("/") == 1
    assert ".." not in candidate_folder("nli", uid)
