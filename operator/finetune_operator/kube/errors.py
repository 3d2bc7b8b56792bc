"""The exceptions of the API client, and how they follow from an answer."""

from pydantic_core import from_json

from finetune_operator.core.objects import raw


class ApiError(Exception):
    """The API server answered with an error. `code` is the HTTP status, `reason` the reason of its Status object."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        self.code, self.reason, self.message = code, reason, message
        super().__init__(f"{code} {reason}: {message}")


class CreateDenied(Exception):
    """A child cannot be created for now: its name is taken, a quota is full, or an admission webhook denied it."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason, self.message = reason, message
        super().__init__(f"{reason}: {message}")


class NamespaceTerminating(Exception):
    """The namespace is being deleted, and all objects of the job with it: there is nothing left to do or to report."""


class UnreadableAnswer(OSError):
    """The API server, or a proxy before it, answered with something that is no object or list."""


def error_of(code: int, data: bytes) -> ApiError:
    """Return the exception for an answer with an error status."""
    try:
        status = from_json(data)
    except ValueError:
        return ApiError(code, "", data[:200].decode(errors="replace"))
    return ApiError(code, raw.text(status, "reason"), raw.text(status, "message"))


def unreadable(where: str, data: bytes, error: ValueError) -> UnreadableAnswer:
    """Return the exception for an answer that cannot be read; it shows how the answer begins."""
    begins = data[:80].decode(errors="replace")
    return UnreadableAnswer(f"the answer of {where} cannot be read ({error}): it begins with {begins!r}")


def create_error(kind: str, name: str, error: ApiError) -> CreateDenied | NamespaceTerminating | None:
    """Return the exception for a create that will fail again; None for a temporary error of the server."""
    if error.code == 403:
        if "exceeded quota" in error.message:
            return CreateDenied("QuotaExceeded", error.message)
        if "being terminated" in error.message:
            return NamespaceTerminating(error.message)
        return CreateDenied("Forbidden", f"{kind} {name}: {error.message}")
    if error.code in (400, 422):
        return CreateDenied("Rejected", f"{kind} {name}: {error.message}")
    return None
