"""The one classifier of S3 errors: which to retry, and how to explain the rest to the user."""

from dataclasses import dataclass
from typing import Final, Literal

from boto3.exceptions import Boto3Error
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError as Urllib3Error

from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import (
    BucketNotFound,
    StoreAccessDenied,
    StoreCorrupted,
    StoreError,
    StoreMisconfigured,
    StoreNotFound,
    StoreUnavailable,
)
from finetune_trainer.stores.s3.answers import EndlessAnswer

#: Everything the S3 client may raise for reasons outside this program.
S3_ERRORS: Final = (
    boto.BotoCoreError,
    boto.ClientError,
    Boto3Error,
    Urllib3Error,
    ResponseParserError,
    ConnectionError,
    TimeoutError,
    ValueError,  # botocore's, for a number or a date in an answer that is none
    RecursionError,  # botocore's, for a redirect that leads to itself
)

#: Whether an operation may succeed if it is done again: when the store is back ("outage"), at once, because bytes were
#: lost or changed on the way ("corruption"), or never ("final").
Retry = Literal["outage", "corruption", "final"]

_CORRUPTION: Final = (
    boto.IncompleteReadError,
    boto.ResponseStreamingError,
    boto.FlexibleChecksumError,
    boto.ChecksumError,
    ResponseParserError,
    Urllib3Error,
    StoreCorrupted,
    ValueError,  # botocore's, for a number or a date in an answer that is none
)
_CORRUPTION_CODES: Final = frozenset(
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
_OUTAGE: Final = (boto.ConnectionError, boto.HTTPClientError, ConnectionError, TimeoutError)
#: Codes of an overloaded store that come with other statuses than 5xx and 429.
_OUTAGE_CODES: Final = frozenset(
    [
        "RequestTimeout",
        "RequestTimeoutException",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "RequestLimitExceeded",
    ]
)
_NO_CREDENTIALS: Final = (
    boto.NoCredentialsError,
    boto.PartialCredentialsError,
    boto.CredentialRetrievalError,
    boto.ProfileNotFound,
)
_DENIED_CODES: Final = frozenset(
    [
        "AccessDenied",
        "InvalidAccessKeyId",
        "SignatureDoesNotMatch",
        "ExpiredToken",
        "InvalidToken",
        "Forbidden",
        "AllAccessDisabled",
        "AccountProblem",
        "InvalidClientTokenId",
        "AuthFailure",
        "Unauthorized",
        "401",
        "403",
    ]
)
#: The HTTP status of a server that knows no such request or condition: asking again is in vain.
NOT_IMPLEMENTED: Final = 501
#: Characters of a code; servers make up their own.
_LONGEST_CODE: Final = 64
_MISSING_CODES: Final = frozenset(("NoSuchKey", "NotFound", "404"))


@dataclass(frozen=True)
class Location:
    """What a message must name: the manifest's fields, the object, the bucket and the endpoint."""

    field: str
    credentials: Credentials
    uri: str
    bucket: str
    endpoint: str

    @property
    def subject(self) -> str:
        """The beginning of a message about the object."""
        return f"{self.field}: {self.uri} at {self.endpoint}"


def code_of(error: BaseException) -> str:
    """Return S3's error code, or '' for an error that did not come from the server."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))[:_LONGEST_CODE]
    return ""


def status_of(error: BaseException) -> int:
    """Return the HTTP status, or 0."""
    if isinstance(error, boto.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def classify(error: BaseException) -> Retry:
    """Return whether, and for what reason, to retry after `error`."""
    code = code_of(error)
    if isinstance(error, _CORRUPTION) or code in _CORRUPTION_CODES:
        return "corruption"
    if isinstance(error, boto.ClientError):
        broken = status_of(error) >= 500 and status_of(error) != NOT_IMPLEMENTED
        overloaded = broken or status_of(error) == 429 or code in _OUTAGE_CODES
        return "outage" if overloaded else "final"
    return "outage" if isinstance(error, _OUTAGE) and not isinstance(error, boto.SSLError) else "final"


def is_missing_object(error: BaseException) -> bool:
    """Return whether the server has no such object (a HEAD cannot tell whether the bucket exists)."""
    return code_of(error) in _MISSING_CODES


def explain(error: BaseException, location: Location) -> StoreError:
    """Return the store's error for one of S3_ERRORS."""
    code, status = code_of(error), status_of(error)
    if isinstance(error, _NO_CREDENTIALS):
        missing = "half of the credentials" if isinstance(error, boto.PartialCredentialsError) else "no credentials"
        return StoreAccessDenied(
            f"{location.subject}: {missing}: set AWS_ACCESS_KEY_ID and"
            f" AWS_SECRET_ACCESS_KEY {location.credentials.where}"
        )
    if code == "NoSuchBucket":
        return missing_bucket(location)
    if code in _MISSING_CODES:
        return StoreNotFound(f"{location.subject} does not exist")
    if code == "RequestTimeTooSkewed":
        return StoreUnavailable(
            f"{location.subject}: this machine's clock differs too much from the store's: check NTP"
        )
    if code in _DENIED_CODES or status in (401, 403):
        return StoreAccessDenied(
            f"{location.subject}: access denied ({code or status}): check the keys"
            f" {location.credentials.where} and what they may read or write"
        )
    if status in (301, 307):
        return StoreUnavailable(f"{location.subject}: bucket {location.bucket} is in another region: set AWS_REGION")
    if isinstance(error, boto.ClientError):
        return StoreUnavailable(f"{location.subject}: the store keeps answering {code or 'an error'} (HTTP {status})")
    return StoreUnavailable(f"{location.subject}: {_reason(error)}: check the endpoint, {location.credentials.network}")


def invalid_setting(error: Exception, field: str, credentials: Credentials) -> StoreMisconfigured:
    """Return the error for an InvalidSetting."""
    return StoreMisconfigured(f"{field}: {error} ({credentials.where})")


def missing_bucket(location: Location) -> BucketNotFound:
    """Return the error for a bucket that does not exist."""
    return BucketNotFound(
        f"{location.field}: bucket {location.bucket} does not exist at {location.endpoint}: create it or change the URI"
    )


def _reason(error: BaseException) -> str:
    """Return the reason in words: botocore's own texts hold full URLs, some with the object's key twice."""
    # botocore wraps what it does not know.
    cause = error.kwargs.get("error") if isinstance(error, boto.HTTPClientError) else error
    if isinstance(cause, EndlessAnswer):
        return str(cause)
    if isinstance(error, boto.SSLError):
        return "the TLS connection failed (set AWS_CA_BUNDLE for a private certificate authority)"
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return "no answer in time"
    if isinstance(error, boto.ConnectionError):
        return "cannot connect"
    if isinstance(error, ValueError | RecursionError | ResponseParserError):
        return "its answers cannot be read"
    return f"the connection failed ({type(error).__name__})"
