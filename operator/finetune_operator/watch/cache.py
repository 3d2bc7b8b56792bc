"""The latest state of every object we watch, in memory: reconciling a job that is at rest costs no API call."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final, TypeVar

from finetune_api import constants
from finetune_api.status import TrainerReport
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.observed import (
    Child,
    JobObject,
    Notice,
    Observed,
    Pod,
)
from finetune_operator.core.objects.raw import Raw

View = JobObject | Child | Pod
V = TypeVar("V", JobObject, Child, Pod)

KINDS: Final[dict[str, type[JobObject] | type[Child] | type[Pod]]] = {
    constants.KIND: JobObject,
    "Job": Child,
    "Pod": Pod,
}
#: Deleted pods kept per rank of a Job: a pod may be gone before its Job says that it failed, and with it the exit code.
GHOSTS = 3
_TOMBSTONES = 20_000
_NOTICES = 10_000
_ECHOES = 1_000


def key_of(kind: str, obj: Raw) -> str | None:
    """namespace/name of the FineTuneJob that an object is or belongs to; None when it belongs to none."""
    name = raw.text(obj, "metadata", "name") if kind == constants.KIND else raw.labels(obj).get(constants.LABEL_JOB, "")
    namespace = raw.text(obj, "metadata", "namespace")
    return f"{namespace}/{name}" if name and namespace else None


class Cache:
    """Views by kind, job key and uid. Older versions and objects known to be deleted are not let in.

    Except by a full list of a restored etcd, where history itself has gone back: such a list always wins.
    """

    def __init__(self) -> None:
        self._views: dict[str, dict[str, dict[str, View]]] = {kind: {} for kind in KINDS}
        self._ghosts: dict[str, list[Pod]] = {}
        self._keys: dict[str, str] = {}
        self._gone: OrderedDict[str, str] = OrderedDict()
        """What is known to be deleted; of a Job, the FineTuneJob it was of."""
        self._notices: OrderedDict[str, Notice] = OrderedDict()
        self._listed: dict[tuple[str, str], int] = {}
        self._own: OrderedDict[tuple[str, int], None] = OrderedDict()

    def put(self, kind: str, obj: Raw, force: bool = False) -> str | None:
        """Take in an object; its job's key when that told something new, else None. `force`: older ones, too."""
        key, uid = key_of(kind, obj), raw.text(obj, "metadata", "uid")
        if key is None or (uid in self._gone and not force):
            return None
        self._gone.pop(uid, None)
        known = self._views[kind].setdefault(key, {})
        before = known.get(uid)
        if before is not None and raw.version(obj) <= before.version and not force:
            return None
        known[uid] = KINDS[kind].of(obj)
        self._keys[uid] = key
        return key

    def wrote(self, kind: str, obj: Raw) -> None:
        """Take in what a write of our own has made."""
        self.put(kind, obj)
        self._own[kind, raw.version(obj)] = None
        while len(self._own) > _ECHOES:
            self._own.popitem(last=False)

    def is_echo(self, kind: str, version: int) -> bool:
        """Whether a watch event in that version only shows what a write of our own has made. Asked once per event."""
        return self._own.pop((kind, version), self) is None

    def is_known(self, kind: str, obj: Raw) -> bool:
        """Whether an object would tell nothing new."""
        known = self._views[kind].get(key_of(kind, obj) or "", {}).get(raw.text(obj, "metadata", "uid"))
        return known is not None and raw.version(obj) <= known.version

    def drop(self, kind: str, obj: Raw) -> str | None:
        """Forget a deleted object; its job's key."""
        key, uid = key_of(kind, obj), raw.text(obj, "metadata", "uid")
        self.put(kind, obj)  # its last state, which may tell how it ended
        return self.forget(kind, key, uid) if key else None

    def forget(self, kind: str, key: str, uid: str) -> str:
        """Forget the object `uid` for good: a late answer must not bring it back."""
        view = self._remove(kind, key, uid)
        self._gone[uid] = view.owner if isinstance(view, Child) else self._gone.get(uid, "")
        while len(self._gone) > _TOMBSTONES:
            self._gone.popitem(last=False)
        self._notices.pop(uid, None)
        self._ghosts.pop(uid, None)
        if isinstance(view, Pod) and (view.exit or view.disruption) and view.owner in self._keys:
            ghosts = [*self._ghosts.get(view.owner, []), view]
            spare = [ghost.uid for ghost in ghosts if ghost.index == view.index][:-GHOSTS]
            self._ghosts[view.owner] = [ghost for ghost in ghosts if ghost.uid not in spare]
        return key

    def _remove(self, kind: str, key: str, uid: str) -> View | None:
        self._keys.pop(uid, None)
        known = self._views[kind].get(key, {})
        view = known.pop(uid, None)
        if not known:
            self._views[kind].pop(key, None)
        return view

    def is_newer_than(self, kind: str, namespace: str, version: int) -> bool:
        """Whether an earlier full list was younger than one at `version`: then etcd was restored from a backup."""
        return version < self._listed.get((kind, namespace), 0)

    def leave(self, kind: str, namespace: str) -> set[str]:
        """Put aside all objects of a kind in a namespace (empty: everywhere); they may come back. Their jobs' keys."""
        found = [
            (key, uid)
            for key, known in self._views[kind].items()
            if key.startswith(f"{namespace}/" if namespace else "")
            for uid in known
        ]
        for key, uid in found:
            self._remove(kind, key, uid)
        return {key for key, _ in found}

    def keep_only(
        self,
        kind: str,
        present: Iterable[str],
        version: int,
        namespace: str = "",
        only: str = "",
        force: bool = False,
    ) -> set[str]:
        """Forget what a full list at `version` no longer shows; the keys concerned. Newer objects stay, but by `force`.

        The list is of one namespace or of `only` one job's objects, else of everything.
        """
        uids = set(present)
        stale = [
            (key, uid)
            for key, known in self._views[kind].items()
            if key.startswith(f"{namespace}/" if namespace else "") and only in ("", key)
            for uid, view in known.items()
            if uid not in uids and (view.version <= version or force)
        ]
        if not only:
            self._listed[kind, namespace] = version
        return {self.forget(kind, key, uid) for key, uid in stale}

    def wish(self, obj: Raw) -> tuple[str, int, bool] | None:
        """What tells one wish of the user from another, of the FineTuneJob of that name: uid, generation, deletion."""
        job = self.job(key_of(constants.KIND, obj) or "")
        return (job.uid, job.generation, job.deleting) if job else None

    def job_keys(self) -> list[str]:
        """Every FineTuneJob."""
        return list(self._views[constants.KIND])

    def job(self, key: str) -> JobObject | None:
        """The FineTuneJob of that name; the youngest, should an earlier one not be gone yet."""
        found = self._all(JobObject, constants.KIND, key)
        return max(found, key=lambda job: job.version, default=None)

    def _all(self, view: type[V], kind: str, key: str) -> list[V]:
        return [found for found in self._views[kind].get(key, {}).values() if isinstance(found, view)]

    def observed(self, key: str, report: TrainerReport | None) -> Observed | None:
        """Everything known of a FineTuneJob; None when there is none of that name."""
        job = self.job(key)
        if job is None:
            return None
        children = [child for child in self._all(Child, "Job", key) if child.owner == job.uid]
        owners = {child.uid for child in children} | {job.uid}
        pods = self._all(Pod, "Pod", key)
        # A pod whose Job is deleted still belongs to its attempt; one whose Job we never saw may be an earlier job's.
        mine = [pod for pod in pods if pod.owner in owners or self._gone.get(pod.owner) == job.uid]
        ghosts = [pod for child in children for pod in self._ghosts.get(child.uid, [])]
        others = [child for child in self._all(Child, "Job", key) if child.owner not in ("", job.uid)]
        strays = [f"Job {child.name}" for child in others if not child.finished]
        strays += [f"pod {pod.name}" for pod in pods if pod not in mine and pod.live]
        uids = {*(child.uid for child in children), *(pod.uid for pod in mine)}
        notices = {uid: self._notices[uid] for uid in uids if uid in self._notices}
        return Observed(
            job=job,
            children=tuple(sorted(children, key=lambda child: child.attempt)),
            pods=(*mine, *ghosts),
            strays=tuple(strays),
            report=report,
            notices=notices,
        )

    def note(self, uid: str, notice: Notice) -> bool:
        """Keep what an event says of object `uid`; whether that is new. It may come before the object itself, and a
        watch that starts anew replays older ones.
        """
        known = self._notices.get(uid)
        if uid in self._gone or (known and known.at and notice.at and notice.at < known.at):
            return False
        self._notices[uid] = notice
        while len(self._notices) > _NOTICES:
            self._notices.popitem(last=False)
        return known != notice

    def take_back(self, uid: str, reason: str, message: str | None = None) -> bool:
        """Forget what was said of object `uid` if it is for `reason` (in those very words); whether it was."""
        known = self._notices.get(uid)
        if known is None or known.reason != reason or message not in (None, known.message):
            return False
        del self._notices[uid]
        return True

    def key_of_uid(self, uid: str) -> str | None:
        """The job that a Job or pod belongs to."""
        return self._keys.get(uid)

    def jobs(self) -> Iterator[JobObject]:
        """Every FineTuneJob there is."""
        return (job for key in self._views[constants.KIND] if (job := self.job(key)) is not None)

    def sizes(self) -> dict[str, int]:
        """Objects held, by kind."""
        return {kind: sum(map(len, known.values())) for kind, known in self._views.items()}
