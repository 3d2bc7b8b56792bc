"""No fault of the store makes a corrupt publication or a false success.

Every run goes through a proxy that breaks requests at random (seeded); what is in the store afterwards is judged
directly, behind the proxy's back.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from finetune_api import constants
from finetune_api.spec import Metadata
from finetune_api.status import Adapter
from finetune_api.uri import parse
from finetune_trainer.checkpoints import remote
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores.base import Store
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.digest import digest_file
from finetune_trainer.stores.errors import StoreError, StoreUnavailable
from finetune_trainer.stores.fetch import fetch
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.s3 import client, retry
from support.stores.fault_proxy import Faults, Request, faulty
from support.stores.s3 import S3Server

JOB = Metadata(name="nli", namespace="team", uid="1111")
OTHER = Metadata(name="other", namespace="team", uid="2222")
RUNS_AT_ONCE = 6


def make_adapter(folder: Path, seed: int, weights_bytes: int = 40_000) -> Path:
    draw = random.Random(seed)
    (folder / "training").mkdir(parents=True)
    (folder / constants.ADAPTER_CONFIG_FILE).write_text(json.dumps({"seed": seed}))
    (folder / constants.ADAPTER_WEIGHTS_FILE).write_bytes(draw.randbytes(weights_bytes))
    (folder / "tokenizer.json").write_bytes(draw.randbytes(3000))
    (folder / "training" / "metrics.jsonl").write_bytes(draw.randbytes(500))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, store: Store, overwrite: bool = False, job: Metadata = JOB) -> Adapter:
    return AdapterOutput(store, job, overwrite).publish(
        Bundle(folder, ARTIFACTS["Adapter"], base_model="org/base", rank=8, metrics={})
    )


def is_whole(objects: dict[str, bytes], prefix: str) -> bool:
    """Whether every file the manifest names is there with its digest."""
    files = json.loads(objects[f"{prefix}/manifest.json"])["files"]
    return all(
        hashlib.sha256(objects.get(f"{prefix}/{file['path']}", b"")).hexdigest() == file["sha256"] for file in files
    )


@dataclass
class Tally:
    """What came of the runs, and every promise that was broken."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, outcome: str, faults: Faults, broken: list[str]) -> None:
        with self.lock:
            self.outcomes[outcome] += 1
            self.faults.update(faults.counts)
            self.broken += broken


@dataclass(frozen=True)
class Bench:
    """One bucket with a faulty way in."""

    s3: S3Server
    bucket: str
    folder: Path

    def store(self, path: str, endpoint: str | None = None, **settings: str) -> Store:
        env = self.s3.env | ({"AWS_ENDPOINT_URL": endpoint} if endpoint else {}) | settings
        return open_store(parse(f"s3://{self.bucket}/{path}"), Credentials("output", env))


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many retries as in production, with shorter waits."""
    monkeypatch.setattr(retry, "MAX_WAIT", 0.05)
    monkeypatch.setattr(retry, "OUTAGE_SECONDS", 2.0)


@pytest.fixture
def bench(s3: S3Server, bucket: str, tmp_path: Path) -> Bench:
    return Bench(s3, bucket, tmp_path)


def publish_run(bench: Bench, seed: int, rate: float) -> tuple[str, Faults, list[str]]:
    """Publish through faults until it says it is done, as the operator's attempts would; judge after each try."""
    prefix, broken = f"run-{seed}", []
    adapter = make_adapter(bench.folder / prefix, seed)
    overwrite = seed % 3 == 0
    if overwrite:
        put(make_adapter(bench.folder / f"{prefix}-old", seed + 10_000), bench.store(prefix), job=OTHER)
    faults = Faults(seed=seed, rate=rate)
    # The proxy refuses an upload that does not match its signed digest for the manifest only, as S3 does for all: moto
    # would keep the broken manifest, and nothing sent after it could make that unseen.
    with faulty(bench.s3.endpoint, faults, checks_payload=lambda path: path.endswith("manifest.json")) as endpoint:
        try:
            store = bench.store(prefix, endpoint)
            result = AdapterOutput(store, JOB, overwrite).find_published() or put(adapter, store, overwrite)
            outcome = "published"
        except StoreError as error:
            result, outcome = None, f"{type(error).__name__}"
    objects = bench.s3.objects(bench.bucket, prefix)
    data = objects.get(f"{prefix}/manifest.json")
    if data is not None and not is_whole(objects, prefix):
        broken.append(f"{prefix}: a manifest over broken files ({outcome})")
    if result is not None:
        if data is None or result.manifest_digest != f"sha256:{hashlib.sha256(data).hexdigest()}":
            broken.append(f"{prefix}: success without that manifest")
        for path, expected in contents(adapter).items():
            if objects.get(f"{prefix}/{path}") != expected:
                broken.append(f"{prefix}: success with a wrong {path}")
    return outcome, faults, broken


def restore_run(bench: Bench, seed: int, rate: float) -> tuple[str, Faults, list[str]]:
    """Save two checkpoints, then resume and fetch, all through faults."""
    prefix, broken = f"checkpoints-{seed}", []
    states = {step: make_adapter(bench.folder / f"{prefix}-{step}", seed * 7 + step) for step in (500, 1000)}
    saved: list[int] = []
    faults = Faults(seed=seed, rate=rate)
    with faulty(bench.s3.endpoint, faults, checks_payload=lambda path: path.endswith("manifest.json")) as endpoint:
        store = bench.store(prefix, endpoint)
        try:
            for step, folder in states.items():
                remote.save(folder, store, step, keep=2)
                saved.append(step)
            outcome = "saved"
        except StoreError as error:
            outcome = f"save: {type(error).__name__}"
        restored = bench.folder / f"{prefix}-restored"
        try:
            manifest = remote.resume(bench.store(prefix, endpoint), lambda step: restored)
            outcome += ", resumed" if manifest else ", nothing to resume"
        except StoreError as error:
            manifest, outcome = None, f"{outcome}, resume: {type(error).__name__}"
            if restored.exists():
                broken.append(f"{prefix}: a failed restore left a folder")
        if manifest is not None and contents(restored) != contents(states[manifest.step or 0]):
            broken.append(f"{prefix}: restored something else than was saved")
        if manifest is None and "nothing" in outcome and saved:
            broken.append(f"{prefix}: {saved} were saved, then said not to be there")
    found = remote.resume(bench.store(prefix), lambda step: bench.folder / f"{prefix}-direct")
    newest = found.step or 0 if found else 0
    if saved and newest < max(saved):
        broken.append(f"{prefix}: save({max(saved)}) succeeded, yet the newest whole one is {newest}")
    return outcome, faults, broken


@pytest.mark.parametrize("share", [0.5, pytest.param(1, marks=pytest.mark.nightly)])
def test_hundreds_of_faults_make_no_corrupt_publication_and_no_false_success(
    bench: Bench, share: float, capsys
) -> None:
    tally = Tally()
    runs = [(publish_run, seed, 0.12 + 0.05 * (seed % 4)) for seed in range(int(20 * share))]
    runs += [(restore_run, seed, 0.12 + 0.05 * (seed % 4)) for seed in range(100, 100 + int(8 * share))]
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        for done in [pool.submit(run, bench, seed, rate) for run, seed, rate in runs]:
            tally.add(*done.result())
    with capsys.disabled():
        print(f"\n{sum(tally.faults.values())} faults in {len(runs)} runs: {dict(tally.faults)}")
        print(f"outcomes: {dict(tally.outcomes)}")
    assert tally.broken == []
    assert sum(tally.faults.values()) >= 200 * share
    assert tally.outcomes["published"] >= 12 * share, "most runs get through in spite of the faults"
    assert tally.outcomes["saved, resumed"] >= 4 * share


def test_parts_of_a_large_file_survive_faults(bench: Bench, monkeypatch) -> None:
    monkeypatch.setattr(client, "MULTIPART_BYTES", 6 << 20)
    monkeypatch.setattr(client, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(retry, "MAX_TRIES", 30)  # most of these faults break the whole transfer: see it through
    local, copy = bench.folder / "weights", bench.folder / "copy"
    local.write_bytes(os.urandom(17 << 20))
    expected = digest_file(local)

    def moves_bytes(request: Request) -> bool:
        return "partNumber" in request.query or (request.method == "GET" and "weights" in request.path)

    faults = Faults(seed=3, rate=0.3, kinds=("reset", "wrong answer", "wrong upload"), only=moves_bytes)
    with faulty(bench.s3.endpoint, faults) as endpoint:
        store = bench.store("large", endpoint)
        for attempt in range(3):
            store.upload(local, f"weights-{attempt}")
            store.download(f"weights-{attempt}", copy, sha256=expected.sha256)
            assert digest_file(copy) == expected
    objects = bench.s3.objects(bench.bucket)
    assert {hashlib.sha256(data).hexdigest() for data in objects.values()} == {expected.sha256}
    assert faults.counts["wrong upload"] and faults.counts["wrong answer"], faults.counts


def test_a_large_upload_that_fails_for_good_leaves_no_parts(bench: Bench, monkeypatch) -> None:
    monkeypatch.setattr(client, "MULTIPART_BYTES", 6 << 20)
    monkeypatch.setattr(client, "PART_BYTES", 5 << 20)
    local = bench.folder / "weights"
    local.write_bytes(os.urandom(11 << 20))
    second_part = Faults(rate=1, kinds=("500",), only=lambda request: "partNumber=2" in request.query)
    with (
        faulty(bench.s3.endpoint, second_part) as endpoint,
        pytest.raises(StoreUnavailable, match=r"keeps answering InternalError \(HTTP 500\)"),
    ):
        bench.store("large", endpoint).upload(local, "weights")
    assert bench.s3.client().list_multipart_uploads(Bucket=bench.bucket).get("Uploads", []) == []
    assert bench.s3.objects(bench.bucket) == {}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_crash_before_any_request_leaves_no_manifest_or_a_whole_one(bench: Bench, overwrite: bool) -> None:
    def changes(request: Request) -> bool:
        return request.method in ("PUT", "DELETE")

    old = make_adapter(bench.folder / "old", 1)
    (old / "training" / "only-in-the-old-one.txt").write_text("x")
    new = make_adapter(bench.folder / "new", 2)

    def crash_at(number: int) -> bool:
        """Publish with everything cut off from the nth change on; whether it got through before."""
        prefix = f"crash-{overwrite}-{number}"
        if overwrite:
            put(old, bench.store(prefix), job=OTHER)
        faults = Faults(crash_at=number, only=changes)
        survived = True
        with faulty(bench.s3.endpoint, faults) as endpoint:
            try:
                store = bench.store(prefix, endpoint, **{constants.ENV_STORE_PATIENCE: "0.2"})  # it never comes back
                put(new, store, overwrite)
            except StoreUnavailable:
                survived = False
        objects = bench.s3.objects(bench.bucket, prefix)
        assert f"{prefix}/manifest.json" not in objects or is_whole(objects, prefix)
        put(new, bench.store(prefix), overwrite)
        objects = bench.s3.objects(bench.bucket, prefix)
        assert (
            is_whole(objects, prefix)
            and contents(new).items() <= {key.removeprefix(f"{prefix}/"): data for key, data in objects.items()}.items()
        )
        return survived

    changes_in_all = 4 + 1 + (2 if overwrite else 0)  # files, manifest; the old manifest and the stale file
    with ThreadPoolExecutor(RUNS_AT_ONCE) as pool:
        survived = list(pool.map(crash_at, range(1, changes_in_all + 2)))
    assert survived == [False] * changes_in_all + [True]


_PUBLISHER = """
import sys
from pathlib import Path
from finetune_api.spec import Metadata
from finetune_api.uri import parse
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.open import open_store
store = open_store(parse(sys.argv[2]), Credentials.for_role("output"))
job = Metadata(name="nli", namespace="team", uid="1111")
bundle = Bundle(Path(sys.argv[1]), ARTIFACTS["Adapter"], base_model="org/base", rank=8, metrics={})
AdapterOutput(store, job).publish(bundle)
"""


@pytest.mark.parametrize("at_request", [2, 9, 14, 17])
def test_a_publisher_killed_in_mid_air_is_mended_by_the_next_attempt(bench: Bench, at_request: int) -> None:
    adapter = make_adapter(bench.folder / "adapter", 5)
    process: subprocess.Popen[bytes] | None = None

    def kill() -> None:
        assert process is not None
        process.send_signal(signal.SIGKILL)
        process.wait()

    faults = Faults(crash_at=at_request, on_crash=kill)
    with faulty(bench.s3.endpoint, faults) as endpoint:
        env = os.environ | bench.s3.env | {"AWS_ENDPOINT_URL": endpoint, constants.ENV_SECRETS_DIR: "/nonexistent"}
        command = [sys.executable, "-c", _PUBLISHER, str(adapter), f"s3://{bench.bucket}/killed"]
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors.decode()
    objects = bench.s3.objects(bench.bucket, "killed")
    assert "killed/manifest.json" not in objects or is_whole(objects, "killed")
    result = AdapterOutput(bench.store("killed"), JOB).find_published() or put(adapter, bench.store("killed"))
    objects = bench.s3.objects(bench.bucket, "killed")
    assert is_whole(objects, "killed")
    assert result.manifest_digest == "sha256:" + hashlib.sha256(objects["killed/manifest.json"]).hexdigest()


def test_a_lost_answer_to_the_manifest_is_no_conflict_with_oneself(bench: Bench) -> None:
    lost = Faults(rate=1, kinds=("late reset",), only=lambda request: request.path.endswith("manifest.json"))
    once = lost.only

    def first_put(request: Request) -> bool:
        return once(request) and request.method == "PUT" and lost.total == 0

    lost.only = first_put
    with faulty(bench.s3.endpoint, lost) as endpoint:
        put(make_adapter(bench.folder / "adapter", 6), bench.store("lost", endpoint))
    assert lost.counts == {"late reset": 1}
    assert is_whole(bench.s3.objects(bench.bucket, "lost"), "lost")


def test_a_fetch_through_faults_brings_the_right_bytes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "OUTAGE_SECONDS", 30.0)  # it must get through, however busy the machine is
    adapter = make_adapter(bench.folder / "adapter", 7)
    put(adapter, bench.store("model"))
    faults = Faults(seed=11, rate=0.2)
    with faulty(bench.s3.endpoint, faults) as endpoint:
        credentials = Credentials("model", bench.s3.env | {"AWS_ENDPOINT_URL": endpoint})
        for number in range(8):
            folder = fetch(parse(f"s3://{bench.bucket}/model"), credentials, bench.folder / f"cache-{number}")
            got = contents(folder)
            got.pop("manifest.json")
            assert got == contents(adapter)
    assert faults.total >= 8, "of some 30 to expect"
