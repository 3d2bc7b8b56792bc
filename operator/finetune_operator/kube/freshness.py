"""Track when each watch was last heard from, and how long the API server has answered."""

import time

from yarl import URL

from finetune_operator.kube.urls import namespace_of, resource_of

#: Cache credentials for this long: reading them is slow, and tokens rotate by the hour.
CREDENTIALS_SECONDS = 10.0


class Freshness:
    """The time of each watch's last event or bookmark; the server sends a bookmark every minute."""

    def __init__(self) -> None:
        self._last_seen: dict[tuple[str, str], float] = {}

    def record(self, url: URL) -> None:
        """Record an event or a bookmark of the watch at `url`."""
        about = url.query.get("fieldSelector", "").rpartition("=")[2]
        self._last_seen[resource_of(url.path) + (f"/{about}" if about else ""), namespace_of(url.path)] = (
            time.monotonic()
        )

    def evict_namespace(self, namespace: str) -> None:
        """Forget the watches of a namespace that we may no longer list: they are not late."""
        self._last_seen = {watch: seen for watch, seen in self._last_seen.items() if watch[1] != namespace}

    def ages(self) -> dict[tuple[str, str], float]:
        """Return the seconds since the last event or bookmark, by resource and namespace (empty: all)."""
        now = time.monotonic()
        return {watch: now - seen for watch, seen in self._last_seen.items()}


class Reachability:
    """Track how long the API server has answered without errors."""

    def __init__(self) -> None:
        self._since: float | None = None

    def record_answer(self, code: int) -> None:
        """Record the HTTP status of an answer."""
        if code >= 500 or code == 429:
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()

    def record_failure(self) -> None:
        """Record a request without an answer."""
        self._since = None

    def seconds(self) -> float:
        """Return the seconds since the last error; 0 while the API server fails."""
        return 0.0 if self._since is None else time.monotonic() - self._since
