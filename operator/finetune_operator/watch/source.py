"""Where watch events come from, behind one interface, and how they enter the cache. Kopf is the one source today."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.raw import Raw
from finetune_operator.watch.cache import Cache

log = structlog.get_logger(__name__)

#: Called with a key and whether the user edited the object itself.
Enqueue = Callable[[ObjectKey, bool], None]


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """A change of one object. `type` is ADDED, MODIFIED or DELETED; None for an object from the source's first list."""

    type: str | None
    kind: str
    object: Raw


class WatchSource(Protocol):
    """A source of watch events for every kind of the registry.

    It may miss deletions while it reconnects: the Relister finds them.
    """

    def events(self) -> AsyncIterator[WatchEvent]:
        """Yield events until the caller stops; reconnect after errors without end."""
        ...

    def restart(self) -> None:
        """Start all watches again from a fresh list."""
        ...


async def feed(source: WatchSource, cache: Cache, enqueue: Enqueue) -> None:
    """Put all events of a source into the cache, until cancelled."""
    async for event in source.events():
        try:
            take(cache, event, enqueue)
        except Exception:
            log.exception("watch event failed; skipping it", kind=event.kind)


def take(cache: Cache, event: WatchEvent, enqueue: Enqueue) -> None:
    """Put one event into the cache and queue the keys it changes. Echoes of our own writes change none."""
    is_reconciled = any(kind.name == event.kind for kind in cache.registry.reconciled)
    before = cache.spec_identity(event.kind, event.object) if is_reconciled else None
    change = cache.drop if event.type == "DELETED" else cache.put
    keys = change(event.kind, event.object)
    is_edit = is_reconciled and bool(keys) and cache.spec_identity(event.kind, event.object) != before
    for key in keys:
        enqueue(key, is_edit and key.kind == event.kind)
