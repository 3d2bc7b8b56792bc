"""Endpoints that an administrator allows: a Secret, which is the user's, may name any."""

import os

from finetune_api import constants, wildcard
from finetune_trainer.stores.credentials import origin


def is_allowed(url: str, allowed: str) -> bool:
    """Return whether `url` matches one of the `allowed` patterns (comma-separated; empty allows any).

    Only its scheme, host and port are compared: no path, user or query can make another host match.

    Raises:
        ValueError: There are patterns, and `url` is no http(s) URL.
    """
    patterns = [pattern.strip().rstrip("/") for pattern in allowed.split(",") if pattern.strip()]
    return not patterns or any(wildcard.matches(origin(url), pattern) for pattern in patterns)


def refusal(url: str) -> str | None:
    """Return why no hub or tracker may be asked at `url`; None where it may.

    The list comes from the pod's environment alone: a Secret could name itself allowed.
    """
    allowed = os.environ.get(constants.ENV_ALLOWED_ENDPOINTS, "")
    try:
        if is_allowed(url, allowed):
            return None
        shown = origin(url)
    except ValueError:
        shown = "an address that is no http:// or https:// URL"
    return f"{shown} is not allowed here; allowed: {allowed} (administrator's rule policy.allowedHubEndpoints)"
