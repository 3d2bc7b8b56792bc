"""When to retry and how long to wait. Waits are random below a bound that doubles ("full jitter").

https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
"""

from collections import Counter
from typing import Final

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential

from finetune_trainer.stores.s3.errors import classify, code_of

#: The bound on the tries of one request, and of one range of a download over all its passes. An outage of the whole
#: store is waited out for OUTAGE_SECONDS instead.
MAX_TRIES: Final = 8
#: Seconds to retry while the store is out of reach or overloaded. FINETUNE_STORE_PATIENCE sets another value.
OUTAGE_SECONDS: Final = 20.0
#: The longest wait between two tries, in seconds.
MAX_WAIT: Final = 5.0


def retry_policy(outage_seconds: float, ranges: "RangeTries | None" = None) -> Retrying:
    """Return the policy of one operation; it ends with the last error itself.

    Args:
        outage_seconds: How long to retry while the store is out of reach.
        ranges: The ranges of a download, which retry by themselves: when one has used up its tries, all is over.
    """

    def stop(state: RetryCallState) -> bool:
        if ranges is not None and ranges.used_up:
            return True
        error = state.outcome.exception() if state.outcome else None
        if error is not None and classify(error) == "corruption":
            return state.attempt_number >= MAX_TRIES
        return (state.seconds_since_start or 0) >= outage_seconds

    return Retrying(stop=stop, wait=_wait(), retry=retry_if_exception(_is_retryable), reraise=True)


class RangeTries:
    """Counts the tries of each range of one download, over all passes through the file."""

    def __init__(self) -> None:
        self._tries: Counter[int] = Counter()

    @property
    def used_up(self) -> bool:
        """Whether a range has no try left."""
        return max(self._tries.values(), default=0) >= MAX_TRIES

    def policy(self, start: int) -> Retrying:
        """Return the policy of the range that begins at byte `start`."""

        def count(_: RetryCallState) -> None:
            self._tries[start] += 1

        def is_retryable(error: BaseException) -> bool:
            # Another version of the object is there now: only a new pass, which asks for its ETag, can get it.
            return _is_retryable(error) and code_of(error) != "PreconditionFailed"

        return Retrying(
            before=count,
            stop=lambda _: self._tries[start] >= MAX_TRIES,
            wait=_wait(),
            retry=retry_if_exception(is_retryable),
            reraise=True,
        )


def _is_retryable(error: BaseException) -> bool:
    return classify(error) != "final"


def _wait() -> wait_random_exponential:
    return wait_random_exponential(multiplier=0.1, max=MAX_WAIT)
