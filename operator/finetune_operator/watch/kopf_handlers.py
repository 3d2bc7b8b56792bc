"""Kopf's part: watch three kinds, take what they show into the cache, and queue the job's key. Nothing else.

Only `on.event` is used: it leaves no annotation and no finalizer on anybody's object.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import kopf

from finetune_api import constants
from finetune_operator.kube.client import PAGE
from finetune_operator.settings import Settings
from finetune_operator.watch.cache import Cache

#: Group, version and plural of each kind.
RESOURCES = {
    constants.KIND: (constants.GROUP, constants.VERSION, constants.PLURAL),
    "Job": ("batch", "v1", "jobs"),
    "Pod": ("", "v1", "pods"),
}


KIND_OF = {plural: kind for kind, (_, _, plural) in RESOURCES.items()}
#: (key, whether the user changed the job itself)
Enqueue = Callable[[str, bool], None]


class Endless(Iterable[float]):
    """Kopf's pauses between tries, without end: were it to give up on one namespace, it would give up on all."""

    def __iter__(self) -> Iterator[float]:
        return itertools.chain((1, 1, 2, 3, 5, 8, 13), itertools.repeat(20))


def registry(cache: Cache, enqueue: Enqueue, login: Callable[[], Any]) -> kopf.OperatorRegistry:
    """Kopf's registry with our handlers."""
    made = kopf.OperatorRegistry()

    @kopf.on.login(registry=made)  # type: ignore[untyped-decorator]
    async def log_in(**_: Any) -> Any:
        return login()

    def watch(kind: str) -> None:
        group, version, plural = RESOURCES[kind]

        @kopf.on.event(group, version, plural, id=f"see-{plural}", registry=made)  # type: ignore[untyped-decorator]
        async def see(event: dict[str, Any], **_: Any) -> None:
            take(cache, kind, event, enqueue)

    for kind in RESOURCES:
        watch(kind)
    return made


def take(cache: Cache, kind: str, event: dict[str, Any], enqueue: Enqueue) -> None:
    """Take one watch event in; echoes of our own writes tell nothing new and queue nothing."""
    obj = dict(event.get("object") or {})
    before = cache.wish(obj) if kind == constants.KIND else None
    key = cache.drop(kind, obj) if event.get("type") == "DELETED" else cache.put(kind, obj)
    if key is not None:
        enqueue(key, kind == constants.KIND and cache.wish(obj) != before)


class NoDiffBase(kopf.DiffBaseStorage):  # type: ignore[misc]
    """Keeps no last-seen state: Kopf would copy every object thrice on each event, most of the time it takes."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        pass


class NoProgress(kopf.ProgressStorage):  # type: ignore[misc]
    """Keeps no handlers' progress: `on.event` handlers have none."""

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


def kopf_settings(settings: Settings) -> kopf.OperatorSettings:
    """Kopf as production needs it: watches that cannot freeze unseen, selectors on the server, no traces on objects."""
    made = kopf.OperatorSettings()
    made.watching.server_timeout = settings.watch_server_timeout_seconds
    made.watching.client_timeout = settings.watch_client_timeout_seconds
    made.watching.inactivity_timeout = settings.watch_inactivity_seconds
    made.watching.connect_timeout = settings.request_timeout_seconds
    made.watching.chunk_size = PAGE
    made.watching.reconnect_backoff = 0.5
    for kind in ("Job", "Pod"):
        made.watching.label_selectors[RESOURCES[kind]] = constants.LABEL_JOB
    made.networking.request_timeout = settings.request_timeout_seconds
    made.networking.error_backoffs = Endless()
    # worker_limit stays unset: workers keep their slot while idle, so a limit throttles instead of protecting.
    made.queueing.idle_timeout = 1.0
    made.scanning.disabled = True
    made.posting.enabled = False
    made.persistence.finalizer = f"{constants.GROUP}/finalizer"
    made.persistence.progress_storage = NoProgress()
    made.persistence.diffbase_storage = NoDiffBase()
    made.peering.standalone = True
    # Kopf kills its process ten minutes after it has ended, sure to be its last. Here it is begun anew.
    made.process.ultimate_exiting_timeout = None
    return made
