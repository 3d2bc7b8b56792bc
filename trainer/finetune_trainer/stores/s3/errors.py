"""From botocore's many exceptions to the few a user can act on."""

from dataclasses import dataclass
from typing import Final

from boto3.exceptions import Boto3Error
from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import RetriesExceededError
from urllib3.exceptions import HTTPError as Urllib3Error

from finetune_trainer.stores.errors import (
    BucketNotFound,
    StoreAccessDenied,
    StoreError,
    StoreMisconfigured,
    StoreNotFound,
    StoreUnavailable,
)

#: Everything the S3 client may raise for reasons outside this program.
S3_ERRORS: Final = (
    boto.BotoCoreError,
    boto.ClientError,
    Boto3Error,
    RetriesExceededError,
    Urllib3Error,
    ResponseParserError,
    ConnectionError,
    TimeoutError,
    ValueError,  # botocore's, for a number or a date in an answer that is none
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
_MISSING_CODES: Final = frozenset(("NoSuchKey", "NotFound", "404"))


@dataclass(frozen=True)
class Place:
    """What a message has to name: the manifest's fields, the object, the bucket and the endpoint."""

    field: str
    secret_field: str
    uri: str
    bucket: str
    endpoint: str

    @property
    def what(self) -> str:
        return f"{self.field}: {self.uri} at {self.endpoint}"


def code_of(error: BaseException) -> str:
    """S3's error code, or '' for an error that never came from the server."""
    if isinstance(error, boto.ClientError):
        return str(error.response.get("Error", {}).get("Code", ""))
    return ""


def status_of(error: BaseException) -> int:
    """The HTTP status, or 0."""
    if isinstance(error, boto.ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    return 0


def is_missing_object(error: BaseException) -> bool:
    """Whether the server says that there is no such object (a HEAD cannot say whether the bucket is there)."""
    return code_of(error) in _MISSING_CODES


def explain(error: BaseException, place: Place) -> StoreError:
    """The store's error for one of S3_ERRORS."""
    code, status = code_of(error), status_of(error)
    if isinstance(error, _NO_CREDENTIALS):
        missing = "half of the credentials" if isinstance(error, boto.PartialCredentialsError) else "no credentials"
        return StoreAccessDenied(f"{place.what}: {missing}: {set_keys(place.secret_field)}")
    if code == "NoSuchBucket":
        return missing_bucket(place)
    if code in _MISSING_CODES:
        return StoreNotFound(f"{place.what} does not exist")
    if code == "RequestTimeTooSkewed":
        return StoreUnavailable(f"{place.what}: this machine's clock differs too much from the store's: check NTP")
    if code in _DENIED_CODES or status in (401, 403):
        return StoreAccessDenied(
            f"{place.what}: the store refused the request ({code or status}): check the keys in the Secret named by"
            f" {place.secret_field} (or in the environment) and what they may read or write"
        )
    if status in (301, 307):
        return StoreUnavailable(f"{place.what}: bucket {place.bucket} is in another region: set AWS_REGION")
    if isinstance(error, boto.ClientError):
        return StoreUnavailable(f"{place.what}: the store keeps answering {code or 'an error'} (HTTP {status})")
    return StoreUnavailable(f"{place.what}: {_reason(error)}: check the endpoint, DNS and NetworkPolicies")


def bad_setting(error: Exception, field: str, secret_field: str) -> StoreMisconfigured:
    """The error for a BadSetting."""
    return StoreMisconfigured(f"{field}: {error} (in the Secret named by {secret_field}, or in the environment)")


def missing_bucket(place: Place) -> BucketNotFound:
    """The error for a bucket that is not there."""
    return BucketNotFound(
        f"{place.field}: bucket {place.bucket} does not exist at {place.endpoint}: create it or change the URI"
    )


def set_keys(secret_field: str) -> str:
    """What to do about missing keys."""
    return (
        f"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the Secret named by {secret_field} or in the environment"
    )


def _reason(error: BaseException) -> str:
    """In words: botocore's own texts hold full URLs, some with the object's key twice."""
    if isinstance(error, boto.SSLError):
        return "the TLS connection failed (set AWS_CA_BUNDLE for a private certificate authority)"
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return "no answer in time"
    if isinstance(error, boto.ConnectionError):
        return "cannot connect"
    if isinstance(error, ValueError | ResponseParserError):
        return "its answers cannot be read"
    return f"the connection failed ({type(error).__name__})"
