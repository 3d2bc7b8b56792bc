"""Full lists: at the start, now and then, and whenever a watch has begun anew and may have missed the end of an object.

A namespace that may not be listed (it is gone, or its RoleBinding is) is said so, and the others are served on.
"""

import asyncio
import time
from collections.abc import Callable

import structlog

from finetune_api import constants
from finetune_operator.core.objects import raw
from finetune_operator.kube.client import ApiError, Cluster
from finetune_operator.watch.cache import KINDS, Cache

log = structlog.get_logger(__name__)

#: Watches that broke together begin anew together: one list serves them all.
GATHER_SECONDS = 2.0
#: A list that failed is tried again this soon.
RETRY_SECONDS = 10.0
_MAY_NOT = (403, 404)


class Lists:
    """Keeps the cache to what the API server holds. `on_news` gets the key of every job and of what is gone,
    `on_refused` a namespace that may not be seen; `on_restored` is called when etcd has been restored from a backup."""

    def __init__(
        self,
        cluster: Cluster,
        cache: Cache,
        namespaces: tuple[str, ...],
        interval: float,
        on_news: Callable[[str], None],
        on_refused: Callable[[str], None],
        on_restored: Callable[[], None],
    ) -> None:
        self._cluster, self._cache, self._namespaces = cluster, cache, namespaces or ("",)
        self._interval, self._on_news = interval, on_news
        self._on_refused, self._on_restored = on_refused, on_restored
        self._asked = asyncio.Event()
        self._first: set[tuple[str, str]] = set()
        self._tried = self._done = time.monotonic()
        self.refused: dict[str, int] = {}
        """Namespaces that may not be listed, with the HTTP code."""

    def age(self) -> float:
        """Seconds since the last full list."""
        return time.monotonic() - self._done

    def idle(self) -> float:
        """Seconds since the last try, be it that it failed: an API server that is away is no fault of ours."""
        return time.monotonic() - self._tried

    def ask(self) -> None:
        """Make a full list soon."""
        self._asked.set()

    def kopf_listed(self, resource: str, namespace: str) -> None:
        """Kopf has listed. After its first time that means: a watch begins anew, and Kopf tells of no deletion that
        it has missed in between."""
        if (resource, namespace) in self._first or namespace in self.refused:
            self.ask()
        self._first.add((resource, namespace))

    def serves(self, key: str) -> bool:
        """Whether all of a job's objects can be seen."""
        return key.partition("/")[0] not in self.refused

    async def run(self) -> None:
        """List until cancelled."""
        well = True
        while True:
            pause = self._interval if well and not self.refused else min(self._interval, RETRY_SECONDS)
            try:
                async with asyncio.timeout(pause):
                    await self._asked.wait()
                await asyncio.sleep(GATHER_SECONDS)
            except TimeoutError:
                pass
            is_full = self._asked.is_set() or not well or self.age() >= self._interval
            self._asked.clear()
            try:
                await self.once(None if is_full else tuple(self.refused))
                well = True
            except (ApiError, OSError, TimeoutError) as error:
                log.warning("a full list failed; the next one follows", error=str(error) or type(error).__name__)
                well = False
            finally:
                self._tried = time.monotonic()

    async def once(self, namespaces: tuple[str, ...] | None = None) -> None:
        """Make the cache what the API server holds, and queue every job. Raises what Cluster raises, a refusal only
        when no namespace may be listed. `namespaces`: only these, not all."""
        news: set[str] = set()
        refusal: ApiError | None = None
        for namespace in self._namespaces if namespaces is None else namespaces:
            try:
                news |= await self._list(namespace)
            except ApiError as error:
                if not namespace or error.code not in _MAY_NOT:
                    raise
                news |= self._refuse(namespace, error)
                refusal = error
            else:
                if self.refused.pop(namespace, None):
                    log.info("a namespace may be listed again", namespace=namespace)
        if refusal and len(self.refused) == len(self._namespaces):
            raise refusal
        for key in {*news, *self._cache.job_keys()}:
            self._on_news(key)
        if namespaces is None:
            self._done = time.monotonic()

    async def _list(self, namespace: str) -> set[str]:
        """List one namespace (empty: all); the keys of what is gone."""
        gone: set[str] = set()
        for kind in KINDS:
            uids: list[str] = []
            version, is_back = 0, False
            async for page in self._cluster.pages(
                kind, namespace, "" if kind == constants.KIND else constants.LABEL_JOB
            ):
                if not uids and (is_back := self._cache.is_newer_than(kind, namespace, page.version)):
                    log.warning("the API server has gone back in time; believing it", kind=kind, version=page.version)
                    self._on_restored()
                version = page.version
                for obj in page.items:
                    self._cache.put(kind, obj, force=is_back)
                    uids.append(raw.text(obj, "metadata", "uid"))
            gone |= self._cache.keep_only(kind, uids, version, namespace, force=is_back)
        return gone

    def _refuse(self, namespace: str, error: ApiError) -> set[str]:
        """What may not be seen is not served: it is put aside until it may."""
        if namespace not in self.refused:
            log.error("a namespace may not be listed; the others are served", namespace=namespace, error=str(error))
        self.refused[namespace] = error.code
        self._on_refused(namespace)
        return set().union(*(self._cache.leave(kind, namespace) for kind in KINDS))
