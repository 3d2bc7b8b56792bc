"""The latest state of every watched object, in memory: reconciling a job that needs nothing costs no API call."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from finetune_operator.core.controllers import REGISTRY, Registry
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.kinds import POD, ObjectKey
from finetune_operator.core.objects.observed import Child, JobObject, WaitReason
from finetune_operator.core.objects.pod import Pod
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.objects.snapshot import ReconciledView, Snapshot, View
from finetune_operator.watch.claims import Claims
from finetune_operator.watch.doubts import Doubt, Doubts, may_write

V = TypeVar("V")

#: Deleted pods kept per rank of a Job: a pod may be gone before its Job says that it failed, and with it the exit code.
KEPT_DELETED_PODS = 3
MAX_TOMBSTONES = 20_000
#: Kept for each namespace, so that whoever writes many events pushes out only those of a namespace of theirs.
MAX_WAIT_REASONS = 2_000
MAX_OWN_WRITES = 1_000


class Cache:
    """Views by kind, key and uid. Older versions and objects known to be deleted are not let in.

    Except by a full list of a restored etcd, where history itself has gone back: such a list always wins.
    """

    def __init__(self, registry: Registry = REGISTRY) -> None:
        self.registry = registry
        self._views: dict[str, dict[ObjectKey, dict[str, View]]] = {kind: {} for kind in registry.watched}
        self._deleted_pods: dict[str, list[Pod]] = {}
        self._keys: dict[str, tuple[ObjectKey, ...]] = {}
        self._tombstones: OrderedDict[str, str] = OrderedDict()
        """What is known to be deleted; for a Job, the uid of its owner."""
        self._wait_reasons: dict[str, OrderedDict[str, WaitReason]] = {}
        """By namespace and uid: whoever can write events in one namespace may name any uid."""
        self._doubts = Doubts()
        self._claims = Claims()
        self._listed: dict[tuple[str, str], int] = {}
        self._own_writes: OrderedDict[tuple[str, int], None] = OrderedDict()

    def put(self, kind: str, obj: Raw, force: bool = False) -> tuple[ObjectKey, ...]:
        """Upsert an object; return the keys for which it changed. `force` lets older versions in, too."""
        changed = self._put(kind, obj, self.registry.keys_of(kind, obj), force)
        if changed and self.registry.is_selected(kind, obj):
            self._doubts.remove(changed, raw.text(obj, "metadata", "uid"))
        elif changed:
            self._follow(kind, obj)
        return changed

    def put_unlabeled(self, kind: str, obj: Raw, key: ObjectKey) -> None:
        """Upsert an object of `key` that no watch shows."""
        self._put(kind, obj, (key,))
        self._follow(kind, obj)

    def _follow(self, kind: str, obj: Raw) -> None:
        """Doubt an object that no watch shows for as long as it can write."""
        uid, name = raw.text(obj, "metadata", "uid"), raw.text(obj, "metadata", "name")
        if may_write(self._find(kind, uid)):
            self._doubts.add(self._keys.get(uid, ()), Doubt(kind, name, uid, is_there=True))
        else:
            self._doubts.remove(self._keys.get(uid, ()), uid)

    def _find(self, kind: str, uid: str) -> View | None:
        known = (self._views[kind].get(key, {}).get(uid) for key in self._keys.get(uid, ()))
        return next((view for view in known if view), None)

    def _put(self, kind: str, obj: Raw, keys: tuple[ObjectKey, ...], force: bool = False) -> tuple[ObjectKey, ...]:
        uid = raw.text(obj, "metadata", "uid")
        if not keys or (uid in self._tombstones and not force):
            return ()
        self._tombstones.pop(uid, None)
        stale = [key for key in keys if force or self._is_news(kind, key, uid, raw.version(obj))]
        if stale:
            view = self.registry.view(kind, obj)
            if isinstance(view, JobObject):
                self._claims.put(view)
            for key in stale:
                self._views[kind].setdefault(key, {})[uid] = view
            self._keys[uid] = tuple(dict.fromkeys((*self._keys.get(uid, ()), *keys)))
        return tuple(stale)

    def _is_news(self, kind: str, key: ObjectKey, uid: str, version: int) -> bool:
        known = self._views[kind].get(key, {}).get(uid)
        return known is None or version > known.version

    def put_own_write(self, kind: str, obj: Raw) -> tuple[ObjectKey, ...]:
        """Upsert the answer to a write of our own, and expect the watch to echo it; return the keys it changed."""
        changed = self.put(kind, obj)
        self._own_writes[kind, raw.version(obj)] = None
        while len(self._own_writes) > MAX_OWN_WRITES:
            self._own_writes.popitem(last=False)
        return changed

    def is_echo(self, kind: str, version: int) -> bool:
        """Return whether a watch event in that version only echoes a write of our own. Ask once per event."""
        return self._own_writes.pop((kind, version), self) is None

    def is_known(self, kind: str, obj: Raw) -> bool:
        """Return whether `put` would change nothing."""
        keys, uid = self.registry.keys_of(kind, obj), raw.text(obj, "metadata", "uid")
        return bool(keys) and not any(self._is_news(kind, key, uid, raw.version(obj)) for key in keys)

    def drop(self, kind: str, obj: Raw) -> tuple[ObjectKey, ...]:
        """Remove an object that its watch calls deleted; return its keys."""
        self.put(kind, obj)  # its last state, which may tell how it ended
        uid = raw.text(obj, "metadata", "uid")
        keys = self._keys.get(uid) or self.registry.keys_of(kind, obj)
        self._leave(kind, uid)
        return keys

    def _leave(self, kind: str, uid: str) -> None:
        """Remove what a watch or list shows no more. What could still write is doubted: it may only lack its label."""
        view = self._find(kind, uid)
        if isinstance(view, Child | Pod) and may_write(view):
            self._doubts.add(self._keys[uid], Doubt(kind, view.name, uid))
        else:
            self.tombstone(kind, uid)

    def children(self, key: ObjectKey, kind: str) -> list[Any]:
        """Return what is known of that kind below `key`."""
        return list(self._views[kind].get(key, {}).values())

    def doubts(self, key: ObjectKey) -> list[Doubt]:
        """Return what belongs to `key` and no watch shows: only a look by its name tells whether it is gone."""
        return self._doubts.of(key)

    def tombstone(self, kind: str, uid: str) -> tuple[ObjectKey, ...]:
        """Remove the object `uid` for good, so that a late answer cannot bring it back; return its keys."""
        keys = self._keys.get(uid, ())
        view = self._remove(kind, uid)
        self._tombstones[uid] = view.owner if isinstance(view, Child) else self._tombstones.get(uid, "")
        while len(self._tombstones) > MAX_TOMBSTONES:
            self._tombstones.popitem(last=False)
        for key in keys:
            self._forget_wait_reason(key.namespace, uid)
        self._deleted_pods.pop(uid, None)
        has_ended = isinstance(view, Pod) and (view.exit or view.disruption or view.init)
        # A pod of another namespace, or of another job, may name any Job as its owner.
        if isinstance(view, Pod) and has_ended and set(keys) & set(self._keys.get(view.owner, ())):
            deleted = [*self._deleted_pods.get(view.owner, []), view]
            spare = [pod.uid for pod in deleted if pod.index == view.index][:-KEPT_DELETED_PODS]
            self._deleted_pods[view.owner] = [pod for pod in deleted if pod.uid not in spare]
        return keys

    def _remove(self, kind: str, uid: str) -> View | None:
        view: View | None = None
        self._claims.remove(uid)
        self._doubts.remove(self._keys.get(uid, ()), uid)
        for key in self._keys.pop(uid, ()):
            known = self._views[kind].get(key, {})
            view = known.pop(uid, view)
            if not known:
                self._views[kind].pop(key, None)
        return view

    def is_newer_than(self, kind: str, namespace: str, version: int) -> bool:
        """Return whether an earlier full list was newer than one at `version`: then etcd was restored from a backup."""
        return version < self._listed.get((kind, namespace), 0)

    def evict_namespace(self, kind: str, namespace: str) -> set[ObjectKey]:
        """Remove all objects of a kind in a namespace (empty: everywhere); they may come back. Return their keys."""
        found = list(self._in_namespace(kind, namespace))
        for _, uid, _ in found:
            self._remove(kind, uid)
        return {key for key, _, _ in found}

    def _in_namespace(self, kind: str, namespace: str) -> Iterator[tuple[ObjectKey, str, View]]:
        return (
            (key, uid, view)
            for key, known in self._views[kind].items()
            if namespace in ("", key.namespace)
            for uid, view in known.items()
        )

    def keep_only(
        self,
        kind: str,
        present: Iterable[str],
        version: int,
        namespace: str = "",
        only: ObjectKey | None = None,
        force: bool = False,
    ) -> set[ObjectKey]:
        """Remove what a full list no longer shows; newer objects stay.

        Args:
            kind: Kind of the list.
            present: Uids in the list.
            version: Resource version of the list.
            namespace: Namespace of the list; empty for all.
            only: The list holds only the objects of this key.
            force: Remove newer objects, too: the list comes from a restored etcd.

        Returns:
            The keys of what was removed.
        """
        uids = set(present)
        stale = [
            (key, uid)
            for key, uid, view in self._in_namespace(kind, namespace)
            if only in (None, key) and uid not in uids and (view.version <= version or force)
        ]
        if only is None:
            self._listed[kind, namespace] = version
        for _, uid in stale:
            self._leave(kind, uid)
        return {key for key, _ in stale}

    def spec_identity(self, kind: str, obj: Raw) -> tuple[str, int, bool] | None:
        """Return (uid, generation, deleting), which changes when the user edits the object; None without controller."""
        name, namespace = raw.text(obj, "metadata", "name"), raw.text(obj, "metadata", "namespace")
        owner = self.owner(ObjectKey(kind, namespace, name))
        return (owner.uid, owner.generation, owner.deleting) if owner else None

    def keys(self) -> list[ObjectKey]:
        """Return the key of every object that has a controller."""
        return [key for kind in self.registry.reconciled for key in self._views[kind.name] if key.kind == kind.name]

    def owner(self, key: ObjectKey) -> ReconciledView | None:
        """Return the reconciled object; the latest, should an earlier one of that name not be gone yet."""
        found: Mapping[str, ReconciledView] = self._views[key.kind].get(key, {})  # type: ignore[assignment]
        return max(found.values(), key=lambda view: view.version, default=None)

    def owners(self, view: type[V]) -> Iterator[V]:
        """Return every reconciled object that is read as `view`."""
        return (owner for key in self.keys() if isinstance(owner := self.owner(key), view))

    def snapshot(self, key: ObjectKey) -> Snapshot | None:
        """Return a reconciled object with everything that belongs to its name; None when there is no such object."""
        owner = self.owner(key)
        if owner is None:
            return None
        names = [child.kind.name for child in self.registry[key.kind].children]
        children = {name: tuple(self._views[name].get(key, {}).values()) for name in names}
        uids = [view.uid for views in children.values() for view in views]
        owners = {view.owner for view in children.get(POD.name, ()) if isinstance(view, Pod)}
        return Snapshot(
            key=key,
            owner=owner,
            children=children,
            deleted_pods=tuple(pod for uid in uids for pod in self._deleted_pods.get(uid, ())),
            tombstones={uid: self._tombstones[uid] for uid in owners if uid in self._tombstones},
            unlabeled=tuple(f"{doubt.kind} {doubt.name}" for doubt in self.doubts(key) if doubt.is_there),
            wait_reasons={uid: reason for uid in uids if (reason := self.wait_reason(key.namespace, uid))},
            output_held_by=self._claims.holder(owner) if isinstance(owner, JobObject) else "",
        )

    def set_wait_reason(self, namespace: str, uid: str, reason: WaitReason) -> bool:
        """Keep why object `uid` waits, as told in `namespace`; return whether that is news.

        It may come before the object itself, and a watch that restarts replays older ones.
        """
        known = self.wait_reason(namespace, uid)
        if uid in self._tombstones or (known and known.at and reason.at and reason.at < known.at):
            return False
        kept = self._wait_reasons.setdefault(namespace, OrderedDict())
        kept[uid] = reason
        while len(kept) > MAX_WAIT_REASONS:
            kept.popitem(last=False)
        return known != reason

    def wait_reason(self, namespace: str, uid: str) -> WaitReason | None:
        """Return why the object `uid` of `namespace` waits."""
        kept = self._wait_reasons.get(namespace)
        return kept.get(uid) if kept else None

    def retract(self, namespace: str, uid: str, reason: str, message: str | None = None) -> bool:
        """Forget why object `uid` waits if it is for `reason` (with that very message); return whether it was."""
        known = self.wait_reason(namespace, uid)
        if known is None or known.reason != reason or message not in (None, known.message):
            return False
        self._forget_wait_reason(namespace, uid)
        return True

    def _forget_wait_reason(self, namespace: str, uid: str) -> None:
        if kept := self._wait_reasons.get(namespace):
            kept.pop(uid, None)
            if not kept:
                del self._wait_reasons[namespace]

    def keys_of_uid(self, uid: str) -> tuple[ObjectKey, ...]:
        """Return the keys that a cached object belongs to."""
        return self._keys.get(uid, ())

    def sizes(self) -> dict[str, int]:
        """Return the number of cached objects by kind."""
        return {kind: sum(map(len, known.values())) for kind, known in self._views.items()}
