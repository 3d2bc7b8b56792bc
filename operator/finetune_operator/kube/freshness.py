"""How long ago the API server answered, per watch and for the whole connection."""

import time

from yarl import URL

from finetune_operator.kube.urls import namespace_of, resource_of

#: How long credentials are used before they are asked for again; asking is slow, and tokens rotate by the hour.
CREDENTIALS_SECONDS = 10.0


class Freshness:
    """When each watch last showed a sign of life: an event, or the bookmark the server sends every minute."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], float] = {}

    def note(self, url: URL) -> None:
        """A sign of life from the watch at `url`."""
        about = url.query.get("fieldSelector", "").rpartition("=")[2]
        self._seen[resource_of(url.path) + (f"/{about}" if about else ""), namespace_of(url.path)] = time.monotonic()

    def forget(self, namespace: str) -> None:
        """The watches of a namespace that may not be seen any more are not late."""
        self._seen = {watch: seen for watch, seen in self._seen.items() if watch[1] != namespace}

    def ages(self) -> dict[tuple[str, str], float]:
        """Seconds since the last sign, by resource and namespace (empty: all)."""
        now = time.monotonic()
        return {watch: now - seen for watch, seen in self._seen.items()}


class Reach:
    """Since when the API server answers every request; an outage of its own is no fault of ours."""

    def __init__(self) -> None:
        self._since: float | None = None

    def answered(self, code: int) -> None:
        """One answer came in."""
        if code >= 500 or code == 429:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()

    def failed(self) -> None:
        """One did not."""
        self._since = None

    def seconds(self) -> float:
        """How long it has answered without a break; 0 while it does not."""
        return 0.0 if self._since is None else time.monotonic() - self._since
