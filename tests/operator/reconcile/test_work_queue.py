"""The queue: one reconcile per key at a time, retries that slow down, and what may hurry them."""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.reconcile.work_queue import Backoff, Result, WorkQueue

KEY = ObjectKey("FineTuneJob", "a", "b")


async def run_queue(queue: WorkQueue, act: Callable[[], Coroutine[Any, Any, None]]) -> None:
    work = asyncio.create_task(queue.run())
    try:
        await asyncio.wait_for(act(), 10)
    finally:
        work.cancel()


def test_a_key_is_never_reconciled_twice_at_once_and_late_news_count():
    running, most, seen = 0, 0, 0
    done = asyncio.Event()

    async def reconcile(key: ObjectKey) -> Result:
        nonlocal running, most, seen
        running += 1
        most = max(most, running)
        if seen == 0:
            queue.add(key)
            queue.add(key)
        await asyncio.sleep(0.01)
        running, seen = running - 1, seen + 1
        if seen == 2:
            done.set()
        return Result()

    queue = WorkQueue(reconcile, workers=4)

    async def act() -> None:
        for _ in range(5):
            queue.add(KEY)
        await done.wait()
        await asyncio.sleep(0.05)

    asyncio.run(run_queue(queue, act))
    assert (most, seen) == (1, 2), "five requests at once are one, and two while it runs are one more"


def test_an_error_is_tried_again_with_growing_pauses_and_counted():
    errors: list[Exception | None] = []
    done = asyncio.Event()

    async def reconcile(key: ObjectKey) -> Result:
        if len(errors) < 3:
            raise OSError("no answer")
        done.set()
        return Result()

    queue = WorkQueue(reconcile, 1, Backoff(0.001, 0.01), on_done=lambda key, seconds, error: errors.append(error))

    async def act() -> None:
        queue.add(KEY)
        await done.wait()
        await asyncio.sleep(0)

    asyncio.run(run_queue(queue, act))
    assert [type(error).__name__ for error in errors] == ["OSError", "OSError", "OSError", "NoneType"]


def test_pauses_double_up_to_a_cap_and_are_never_the_same_for_all():
    backoff = Backoff(1, 30)
    pauses = [[backoff.pause(n) for _ in range(50)] for n in range(1, 10)]
    assert all(min(30, 2 ** (n - 1)) / 2 <= p <= min(30, 2 ** (n - 1)) for n, row in enumerate(pauses, 1) for p in row)
    assert len({round(pause, 6) for pause in pauses[5]}) > 40


async def turns_within(seconds: float, queue: WorkQueue, hurry: Callable[[], None]) -> None:
    """Let the queue run, with `hurry` called all the time."""

    async def act() -> None:
        queue.add(KEY)
        for _ in range(int(seconds / 0.01)):
            hurry()
            await asyncio.sleep(0.01)

    await run_queue(queue, act)


def failing(error: Exception | None) -> tuple[WorkQueue, list[ObjectKey]]:
    """A queue whose reconciles raise, or say they are blocked, with pauses of a minute and more."""
    seen: list[ObjectKey] = []

    async def reconcile(key: ObjectKey) -> Result:
        seen.append(key)
        if error:
            raise error
        return Result(blocked=True)

    return WorkQueue(reconcile, 2, Backoff(120, 240)), seen


def test_news_do_not_hurry_a_job_whose_reconcile_failed():
    queue, seen = failing(OSError("no answer"))
    asyncio.run(turns_within(0.3, queue, lambda: queue.add(KEY)))
    assert len(seen) == 1, "a server in trouble is not to be hurried"


def test_a_change_by_the_user_is_tried_at_once_though_the_last_reconcile_failed():
    queue, seen = failing(OSError("no answer"))
    asyncio.run(turns_within(0.1, queue, lambda: queue.add(KEY, changed=True)))
    assert len(seen) >= 2


def test_a_change_while_the_failing_reconcile_runs_is_not_left_for_the_pause():
    seen: list[ObjectKey] = []

    async def reconcile(key: ObjectKey) -> Result:
        seen.append(key)
        if len(seen) == 1:
            queue.add(key, changed=True)
        raise OSError

    queue = WorkQueue(reconcile, 1, Backoff(120, 240))
    asyncio.run(turns_within(0.1, queue, lambda: None))
    assert len(seen) == 2


def test_news_end_the_pause_of_a_job_that_is_blocked():
    queue, seen = failing(None)
    asyncio.run(turns_within(0.1, queue, lambda: queue.add(KEY)))
    assert len(seen) > 2, "what blocks it (an earlier job's Job) may be gone"


def test_a_job_that_is_well_again_may_be_hurried_again():
    seen: list[ObjectKey] = []

    async def reconcile(key: ObjectKey) -> Result:
        seen.append(key)
        if len(seen) == 1:
            raise OSError
        return Result(after=100)

    queue = WorkQueue(reconcile, 1, Backoff(0.01, 0.01))
    asyncio.run(turns_within(0.2, queue, lambda: queue.add(KEY)))
    assert len(seen) > 3


def test_namespaces_take_turns_so_a_crowd_in_one_delays_no_other():
    order: list[ObjectKey] = []

    async def reconcile(key: ObjectKey) -> Result:
        order.append(key)
        if len(order) == len(crowd) + 3:
            last.set()
        return Result()

    last = asyncio.Event()
    crowd = [ObjectKey("FineTuneJob", "crowd", f"j{index}") for index in range(10_000)]
    first, second = ObjectKey("FineTuneJob", "small", "a"), ObjectKey("FineTuneJob", "tiny", "b")
    queue = WorkQueue(reconcile, workers=1)

    async def act() -> None:
        for key in crowd:
            queue.add(key)
        for key in (first, second, ObjectKey("FineTuneJob", "small", "c")):
            queue.add(key)
        assert queue.depth == len(crowd) + 3
        await last.wait()

    asyncio.run(run_queue(queue, act))
    assert order[:5] == [crowd[0], first, second, crowd[1], ObjectKey("FineTuneJob", "small", "c")]
    assert [key for key in order if key.namespace == "crowd"] == crowd, "in their order, and none is lost"


@pytest.mark.parametrize("error", [None, OSError("no answer")])
def test_the_more_of_a_namespace_is_blocked_the_longer_each_waits(error: Exception | None):
    """A thousand jobs whose Jobs are refused cost the API server a few writes a second; after an outage none waits."""
    tries: Counter[str] = Counter()

    async def reconcile(key: ObjectKey) -> Result:
        tries[key.namespace] += 1
        if error:
            raise error
        return Result(blocked=True)

    def hurry() -> None:
        if not tries:
            for index in range(1000):
                queue.add(ObjectKey("FineTuneJob", "crowd", str(index)))

    queue = WorkQueue(reconcile, 16, Backoff(0.01, 0.02))
    asyncio.run(turns_within(0.2, queue, hurry))
    assert tries[KEY.namespace] > 3, "its namespace has no other that is blocked"
    assert (tries["crowd"] > 1010) == (error is not None)


def test_reconciles_that_need_no_request_leave_turns_to_watches_and_probes():
    """A resync queues every job there is; a job of another namespace that comes meanwhile is not behind them all."""
    seen: list[ObjectKey] = []
    late = ObjectKey("FineTuneJob", "small", "late")

    async def reconcile(key: ObjectKey) -> Result:
        seen.append(key)
        return Result()

    queue = WorkQueue(reconcile, workers=16)

    async def act() -> None:
        for index in range(1000):
            queue.add(ObjectKey("FineTuneJob", "crowd", str(index)))
        await asyncio.sleep(0)
        queue.add(late)
        while len(seen) <= 1000:  # noqa: ASYNC110
            await asyncio.sleep(0)

    asyncio.run(run_queue(queue, act))
    assert seen.index(late) < 100
