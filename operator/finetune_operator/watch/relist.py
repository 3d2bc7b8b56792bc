"""Full lists: at the start, every resync, and after a watch restarted and may have missed a deletion.

A namespace that is denied (it is gone, or its RoleBinding is) is reported, and the others are served.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from finetune_operator.core.objects import raw
from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.raw import Raw
from finetune_operator.kube.client import KubeClient
from finetune_operator.kube.errors import ApiError
from finetune_operator.watch.cache import Cache

log = structlog.get_logger(__name__)

#: Watches that broke together restart together: one list serves them all.
GATHER_SECONDS = 2.0
#: Retry a failed list after this time.
RETRY_SECONDS = 10.0
_DENIED = (403, 404)


class Relister:
    """Makes the cache equal to what the API server holds.

    Args:
        client: The API server.
        cache: The cache to update.
        namespaces: Namespaces to list; empty for all.
        interval: Seconds between full lists.
        on_change: Called with the key of every reconciled object, and of everything that is gone.
        on_denied: Called with a namespace that may not be listed.
        on_restored: Called when etcd was restored from a backup.
        on_unreadable: Called with (resource, count) for objects that cannot be read.
    """

    def __init__(
        self,
        client: KubeClient,
        cache: Cache,
        namespaces: tuple[str, ...],
        interval: float,
        on_change: Callable[[ObjectKey], None],
        on_denied: Callable[[str], None],
        on_restored: Callable[[], None],
        on_unreadable: Callable[[str, int], None] = lambda resource, count: None,
    ) -> None:
        self._client, self._cache, self._namespaces = client, cache, namespaces or ("",)
        self._interval, self._on_change = interval, on_change
        self._on_denied, self._on_restored, self._on_unreadable = on_denied, on_restored, on_unreadable
        self._requested = asyncio.Event()
        self._listed_by_source: set[tuple[str, str]] = set()
        self._last_attempt = self._last_success = time.monotonic()
        self.denied: dict[str, int] = {}
        """Namespaces that may not be listed, with the HTTP status."""

    def age(self) -> float:
        """Return the seconds since the last full list that succeeded."""
        return time.monotonic() - self._last_success

    def attempt_age(self) -> float:
        """Return the seconds since the last relist attempt, successful or not."""
        return time.monotonic() - self._last_attempt

    def request(self) -> None:
        """Relist soon."""
        self._requested.set()

    def source_listed(self, resource: str, namespace: str) -> None:
        """Relist after every list of the source but its first: a watch restarted, and may have missed deletions."""
        if (resource, namespace) in self._listed_by_source or namespace in self.denied:
            self.request()
        self._listed_by_source.add((resource, namespace))

    def serves(self, key: ObjectKey) -> bool:
        """Return whether all objects of a key may be listed."""
        return key.namespace not in self.denied

    async def run(self) -> None:
        """Relist until cancelled."""
        succeeded = True
        while True:
            pause = self._interval if succeeded and not self.denied else min(self._interval, RETRY_SECONDS)
            try:
                async with asyncio.timeout(pause):
                    await self._requested.wait()
                await asyncio.sleep(GATHER_SECONDS)
            except TimeoutError:
                pass
            is_full = self._requested.is_set() or not succeeded or self.age() >= self._interval
            self._requested.clear()
            try:
                await self.once(None if is_full else tuple(self.denied))
                succeeded = True
            except (ApiError, OSError, TimeoutError) as error:
                log.warning("relist failed; retrying", error=str(error) or type(error).__name__)
                succeeded = False
            except Exception:
                log.exception("relist failed; retrying")
                succeeded = False
            finally:
                self._last_attempt = time.monotonic()

    async def once(self, namespaces: tuple[str, ...] | None = None) -> None:
        """Make the cache equal to what the API server holds, and queue every reconciled object.

        Args:
            namespaces: List only these; None lists all.

        Raises:
            ApiError: No namespace may be listed, or the API server failed.
            OSError: The connection failed.
            TimeoutError: The API server did not answer.
        """
        changed: set[ObjectKey] = set()
        denial: ApiError | None = None
        for namespace in self._namespaces if namespaces is None else namespaces:
            try:
                changed |= await self._list(namespace)
            except ApiError as error:
                if not namespace or error.code not in _DENIED:
                    raise
                changed |= self._deny(namespace, error)
                denial = error
            else:
                if self.denied.pop(namespace, None):
                    log.info("namespace is accessible again", namespace=namespace)
        if denial and len(self.denied) == len(self._namespaces):
            raise denial
        for key in {*changed, *self._cache.keys()}:
            self._on_change(key)
        if namespaces is None:
            self._last_success = time.monotonic()

    async def _list(self, namespace: str) -> set[ObjectKey]:
        """List one namespace (empty: all); return the keys of what is gone."""
        gone: set[ObjectKey] = set()
        registry = self._cache.registry
        for kind in registry.watched:
            uids: list[str] = []
            version, is_back, is_whole = 0, False, True
            async for page in self._client.pages(kind, namespace, registry.label_selector(kind)):
                if not uids and (is_back := self._cache.is_newer_than(kind, namespace, page.version)):
                    log.warning(
                        "resourceVersion went backwards (etcd restored?); resyncing", kind=kind, version=page.version
                    )
                    self._on_restored()
                version = page.version
                is_whole = is_whole and page.whole
                for obj in page.items:
                    uids.append(raw.text(obj, "metadata", "uid"))
                    self._put(kind, obj, force=is_back)
            if is_whole:
                gone |= self._cache.keep_only(kind, uids, version, namespace, force=is_back)
            else:
                log.error("a list holds objects that cannot be read; skipping them", kind=kind, namespace=namespace)
        return gone

    def _put(self, kind: str, obj: Raw, force: bool) -> None:
        try:
            self._cache.put(kind, obj, force)
        except Exception:
            name = f"{raw.text(obj, 'metadata', 'namespace')}/{raw.text(obj, 'metadata', 'name')}"
            log.exception("object cannot be read; skipping it", kind=kind, name=name)
            self._on_unreadable(self._cache.registry.watched[kind].plural, 1)

    def _deny(self, namespace: str, error: ApiError) -> set[ObjectKey]:
        """Stop serving a namespace until it may be listed again."""
        if namespace not in self.denied:
            log.error("access to namespace denied; serving the others", namespace=namespace, error=str(error))
        self.denied[namespace] = error.code
        self._on_denied(namespace)
        return set().union(*(self._cache.evict_namespace(kind, namespace) for kind in self._cache.registry.watched))
