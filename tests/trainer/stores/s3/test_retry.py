"""One bound on the tries of one range, waits that never fall together, and an outage that is waited out."""

import os
from collections import Counter
from pathlib import Path

import pytest
from tenacity import Future, RetryCallState

from finetune_trainer.stores.digest import digest_file
from finetune_trainer.stores.errors import StoreError, StoreUnavailable
from finetune_trainer.stores.s3 import client, retry
from support.stores.fault_proxy import Fault, Faults, Request, faulty
from support.stores.s3 import S3Server, s3_store


def test_waits_between_tries_are_random_below_a_bound_that_grows() -> None:
    """So that many trainers that lost the store at one moment do not all come back at another."""
    policy = retry.retry_policy(20)

    def waits(attempt: int) -> list[float]:
        state = RetryCallState(policy, None, (), {})
        state.attempt_number = attempt
        state.outcome = Future.construct(attempt, ConnectionError(), has_exception=True)
        return [float(policy.wait(state)) for _ in range(200)]

    bounds = [min(0.1 * 2**attempt, retry.MAX_WAIT) for attempt in range(8)]
    for attempt, bound in enumerate(bounds, start=1):
        drawn = waits(attempt)
        assert 0 <= min(drawn) < bound / 10
        assert bound * 0.8 < max(drawn) <= bound
        assert len(set(drawn)) > 190
    assert bounds[-1] == retry.MAX_WAIT


def test_an_outage_is_retried_for_the_time_given_and_corruption_for_a_few_tries() -> None:
    for error, seconds, expected in ((ConnectionError(), 0.0, 1), (ValueError("garbled"), 0.0, retry.MAX_TRIES)):
        tries: list[int] = []

        def fail(error: Exception = error, tries: list[int] = tries) -> None:
            tries.append(1)
            raise error

        policy = retry.retry_policy(seconds)
        policy.sleep = lambda seconds: None
        with pytest.raises(type(error)):
            policy(fail)
        assert len(tries) == expected


#: Faults that every request of a download meets.
ALWAYS: list[tuple[Fault, ...]] = [
    ("cut answer",),
    ("short answer",),
    ("wrong answer",),
    ("500",),
    ("reset",),
    ("500", "cut answer", "wrong answer", "reset", "503"),
]


@pytest.mark.parametrize("ranges", [1, 2])
@pytest.mark.parametrize("kinds", ALWAYS)
def test_a_range_that_always_fails_is_tried_no_more_often_than_the_bound(
    kinds: tuple[Fault, ...], ranges: int, s3: S3Server, bucket: str, tmp_path: Path, monkeypatch
) -> None:
    """Over all passes and layers together: botocore's own retries, each range's and the operation's."""
    monkeypatch.setattr(retry, "MAX_WAIT", 0.01)
    (tmp_path / "file").write_bytes(os.urandom(ranges * 50_000))
    s3_store(s3, bucket).upload(tmp_path / "file", "weights")
    monkeypatch.setattr(client, "MULTIPART_BYTES", 60_000)
    monkeypatch.setattr(client, "PART_BYTES", 50_000)
    sha256 = digest_file(tmp_path / "file").sha256
    tries: Counter[str] = Counter()

    def is_range(request: Request) -> bool:
        if request.method == "GET":
            tries[request.range] += 1
        return request.method == "GET"

    with faulty(s3.endpoint, Faults(rate=1, kinds=kinds, only=is_range)) as endpoint, pytest.raises(StoreError):
        s3_store(s3, bucket, AWS_ENDPOINT_URL=endpoint).download("weights", tmp_path / "copy", sha256=sha256)
    assert len(tries) == ranges
    assert max(tries.values()) == retry.MAX_TRIES
    assert not (tmp_path / "copy").exists()


def test_a_small_request_that_is_garbled_has_the_same_bound(s3: S3Server, bucket: str, monkeypatch) -> None:
    monkeypatch.setattr(retry, "MAX_WAIT", 0.01)
    s3_store(s3, bucket).write_bytes("manifest.json", b"x" * 1000)
    faults = Faults(rate=1, kinds=("cut answer",))
    with faulty(s3.endpoint, faults) as endpoint, pytest.raises(StoreUnavailable):
        s3_store(s3, bucket, AWS_ENDPOINT_URL=endpoint).read_bytes("manifest.json")
    assert faults.total == retry.MAX_TRIES
