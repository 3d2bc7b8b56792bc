"""How long to insist, by what went wrong. Every wait is random below a bound that grows ("full jitter").

https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
"""

from typing import Final

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import RetriesExceededError
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential
from urllib3.exceptions import HTTPError as Urllib3Error

from finetune_trainer.stores.errors import StoreCorrupted
from finetune_trainer.stores.s3.errors import code_of, status_of

#: Seconds to go on when the store is out of reach or overloaded. FINETUNE_STORE_PATIENCE sets another value.
PATIENCE: Final = 20.0
#: Tries of an operation whose bytes were lost or changed on the way. (botocore tries each request several times, too.)
ATTEMPTS: Final = 5
#: Seconds: the longest wait between two tries.
MAX_WAIT: Final = 5.0

#: The bytes got lost or changed on the way: the same operation may well succeed at once.
_GARBLED: Final = (
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    boto.FlexibleChecksumError,
    boto.ChecksumError,
    RetriesExceededError,
    ResponseParserError,
    Urllib3Error,
    StoreCorrupted,
    ValueError,  # botocore's, for a number or a date in an answer that is none
)
_GARBLED_CODES: Final = frozenset(
    [
        "BadDigest",
        "XAmzContentSHA256Mismatch",
        "XAmzContentChecksumMismatch",
        "IncompleteBody",
        "InvalidDigest",
        "NoSuchUpload",
        "InvalidPart",
        "InvalidPartOrder",
        "EntityTooSmall",
        "MalformedXML",
        "PreconditionFailed",
        "ConditionalRequestConflict",
        "OperationAborted",
    ]
)
_OUT_OF_REACH: Final = (boto.ConnectionError, boto.HTTPClientError, ConnectionError, TimeoutError)


def is_garbled(error: BaseException) -> bool:
    """Whether the operation may succeed when simply done again."""
    return isinstance(error, _GARBLED) or code_of(error) in _GARBLED_CODES


def is_outage(error: BaseException) -> bool:
    """Whether the store may be back soon: not there, silent, resetting connections, or answering 500, 503, SlowDown."""
    if isinstance(error, boto.ClientError):
        return status_of(error) >= 500 or status_of(error) == 429
    return isinstance(error, _OUT_OF_REACH) and not isinstance(error, boto.SSLError)


def insist(patience: float) -> Retrying:
    """A retry policy that ends with the last error itself."""

    def is_enough(state: RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        if error is not None and is_garbled(error):
            return state.attempt_number >= ATTEMPTS
        return (state.seconds_since_start or 0) >= patience

    return Retrying(
        stop=is_enough,
        wait=wait_random_exponential(multiplier=0.1, max=MAX_WAIT),
        retry=retry_if_exception(lambda error: is_garbled(error) or is_outage(error)),
        reraise=True,
    )
