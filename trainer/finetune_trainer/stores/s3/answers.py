"""Read no more of an answer of S3 than a server that means well says. botocore reads all but objects whole."""

from typing import Final

from botocore.awsrequest import AWSResponse

#: A page of a listing has a thousand keys of a thousand bytes, each of which may be escaped.
MAX_BYTES: Final = 16 << 20


class EndlessAnswer(ValueError):
    """An answer is longer than any should be."""


def _content(response: AWSResponse) -> bytes:
    """Return the body, as botocore does and keeps it. Raises EndlessAnswer if it is longer."""
    if response._content is None:
        body = bytearray()
        for chunk in response.raw.stream():
            body += chunk
            if len(body) > MAX_BYTES:
                response.raw.close()
                raise EndlessAnswer(f"its answer has more than {MAX_BYTES >> 20} MiB")
        response._content = bytes(body)
    found: bytes = response._content
    return found


def bound_answers() -> None:
    """Bound all answers that botocore reads whole: listings, and what a server says of an error."""
    AWSResponse.content = property(_content)
