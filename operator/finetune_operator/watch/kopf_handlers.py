"""Kopf's part: watch three kinds, take what they show into the cache, and queue the job's key. Nothing else.

Only `on.event` is used: it leaves no annotation and no finalizer on anybody's object.
"""

from collections.abc import Callable
from typing import Any

import kopf

from finetune_api import constants
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
