"""Kopf's settings and null storages: Kopf watches, and stores nothing on user objects."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import kopf

from finetune_api import constants
from finetune_operator.core.controllers import REGISTRY, Registry
from finetune_operator.settings import Settings

#: Objects per page of Kopf's lists, which cannot be made smaller when the objects are large.
KOPF_PAGE = 25


class InfiniteBackoff(Iterable[float]):
    """Pauses between tries that never end: if Kopf gave up on one namespace, it would give up on all."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1, 1, 2, 3, 5, 8, 13), itertools.repeat(20))


class NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc]
    """Store no last-seen state: Kopf would copy every object three times per event, most of its CPU time."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        pass


class NoProgress(kopf.ProgressStorage):  # type: ignore[misc]
    """Store no progress of handlers: `on.event` handlers have none."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence


def kopf_settings(settings: Settings, registry: Registry = REGISTRY) -> kopf.OperatorSettings:
    """Return production settings: watches that cannot hang, label selectors on the server, no traces on objects."""
    made = kopf.OperatorSettings()
    made.watching.server_timeout = settings.watch_server_timeout_seconds
    made.watching.client_timeout = settings.watch_client_timeout_seconds
    made.watching.inactivity_timeout = settings.watch_inactivity_seconds
    made.watching.connect_timeout = settings.request_timeout_seconds
    made.watching.chunk_size = KOPF_PAGE
    made.watching.reconnect_backoff = 0.5
    for name, kind in registry.watched.items():
        if selector := registry.label_selector(name):
            made.watching.label_selectors[(kind.group, kind.version, kind.plural)] = selector
    made.networking.request_timeout = settings.request_timeout_seconds
    made.networking.error_backoffs = InfiniteBackoff()
    # worker_limit stays unset: an idle worker keeps its slot, so a limit would only slow us down.
    made.queueing.idle_timeout = 1.0
    made.scanning.disabled = True
    made.posting.enabled = False
    made.persistence.finalizer = f"{constants.GROUP}/finalizer"
    made.persistence.progress_storage = NoProgress()
    made.persistence.diffbase_storage = NoDiffBase()
    made.peering.standalone = True
    # Kopf kills the process ten minutes after it ended. Here it restarts instead.
    made.process.ultimate_exiting_timeout = None
    return made
