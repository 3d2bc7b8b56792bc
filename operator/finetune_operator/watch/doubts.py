"""What no watch shows any more but may still write: it is gone only when a look by its name finds nothing."""

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_operator.core.objects.kinds import ObjectKey
from finetune_operator.core.objects.observed import Child
from finetune_operator.core.objects.pod import Pod
from finetune_operator.core.objects.snapshot import View


@dataclass(frozen=True, slots=True)
class Doubt:
    """An object that no watch shows; `is_there` once a look by its name has found it: it has lost its label."""

    kind: str
    name: str
    uid: str
    is_there: bool = False


def may_write(view: View | None) -> bool:
    """Return whether a trainer may run in a Job or pod."""
    return not view.finished if isinstance(view, Child) else isinstance(view, Pod) and view.live


class Doubts:
    """Doubts by key and uid."""

    def __init__(self) -> None:
        self._found: dict[ObjectKey, dict[str, Doubt]] = {}

    def of(self, key: ObjectKey) -> list[Doubt]:
        """Return the doubts about what belongs to `key`."""
        return list(self._found.get(key, {}).values())

    def add(self, keys: Iterable[ObjectKey], doubt: Doubt) -> None:
        """Doubt an object; what a look has found stays found."""
        for key in keys:
            known = self._found.setdefault(key, {})
            if doubt.is_there or doubt.uid not in known:
                known[doubt.uid] = doubt

    def remove(self, keys: Iterable[ObjectKey], uid: str) -> None:
        """Drop a doubt: a watch shows the object, or it is gone."""
        for key in keys:
            known = self._found.get(key, {})
            known.pop(uid, None)
            if not known:
                self._found.pop(key, None)
