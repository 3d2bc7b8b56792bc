"""The kinds that the operator reconciles. See docs/extending/operator-kind.md for how to add one."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from finetune_api import constants
from finetune_operator.core import plan
from finetune_operator.core.attempts import pod_set
from finetune_operator.core.controller import ChildKind, Controller
from finetune_operator.core.objects import kinds, raw, snapshot
from finetune_operator.core.objects.kinds import Kind, ObjectKey
from finetune_operator.core.objects.observed import Child, JobObject, Observed
from finetune_operator.core.objects.pod import Pod
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.objects.snapshot import View
from finetune_operator.core.sweep.controller import FINETUNE_SWEEP
from finetune_operator.core.sweep.observed import SweepObject

FINETUNE_JOB: Controller[Observed] = Controller(
    kind=kinds.FINETUNE_JOB,
    view=JobObject.from_api,
    keep=JobObject.kept,
    is_whole=lambda job: job.is_whole,
    children=(
        ChildKind(kinds.JOB, Child.from_api, constants.LABEL_JOB),
        ChildKind(kinds.POD, Pod.from_api, constants.LABEL_JOB),
    ),
    observe=snapshot.observe,
    plan=plan.plan,
    leader=pod_set.leader,
)


def _kept(controller: Controller[Any], obj: Raw) -> View:
    return controller.keep(controller.view(obj))


def _referenced(obj: Raw, kind: str) -> str:
    """Return the name of the object of `kind` that controls `obj` or its Job; empty where no reference tells."""
    controller = raw.controller(obj)
    name = raw.text(controller, "name")
    if raw.text(controller, "kind") == kind:
        return name
    job, _, number = name.rpartition("-")
    return job if raw.text(controller, "kind") == kinds.JOB.name and number.isdecimal() else ""


class Registry:
    """All controllers, and what cache, watches and lists need to know of them."""

    def __init__(self, *controllers: Controller[Any]) -> None:
        self._controllers = {controller.kind.name: controller for controller in controllers}
        self._views: dict[str, Callable[[Raw], View]] = {}
        self._owners: dict[str, list[tuple[str, str]]] = {}
        self.watched: dict[str, Kind] = {}
        """Every kind to watch, by name."""
        for controller in controllers:
            self._watch(controller.kind, partial(_kept, controller))
        for controller in controllers:
            for child in controller.children:
                self._watch(child.kind, child.view)
                self._owners.setdefault(child.kind.name, []).append((controller.kind.name, child.owner_label))

    def _watch(self, kind: Kind, view: Callable[[Raw], View]) -> None:
        self.watched.setdefault(kind.name, kind)
        self._views.setdefault(kind.name, view)

    def __getitem__(self, kind: str) -> Controller[Any]:
        return self._controllers[kind]

    @property
    def reconciled(self) -> Iterable[Kind]:
        """The kinds that have a controller."""
        return [controller.kind for controller in self._controllers.values()]

    def view(self, kind: str, obj: Raw) -> View:
        """Read what of an object of a watched kind stays in memory."""
        return self._views[kind](obj)

    def keys_of(self, kind: str, obj: Raw) -> tuple[ObjectKey, ...]:
        """Return the keys of the reconciled objects that `obj` is or belongs to.

        An owner reference counts more than a label, which anybody may replace.
        """
        namespace, found = raw.text(obj, "metadata", "namespace"), raw.labels(obj)
        names = [(kind, raw.text(obj, "metadata", "name"))] if kind in self._controllers else []
        for owner, label in self._owners.get(kind, ()):
            names.append((owner, _referenced(obj, owner) or found.get(label, "")))
        return tuple(ObjectKey(owner, namespace, name) for owner, name in names if name and namespace)

    def is_selected(self, kind: str, obj: Raw) -> bool:
        """Return whether the watch of that kind shows `obj`."""
        selector = self.label_selector(kind)
        return not selector or selector in raw.labels(obj)

    def label_selector(self, kind: str) -> str:
        """Return the selector that finds every relevant object of a kind; empty where only the whole kind will do."""
        labels = {label for _, label in self._owners.get(kind, ())}
        return labels.pop() if len(labels) == 1 and kind not in self._controllers else ""

    def kind_of(self, plural: str) -> str | None:
        """Return the watched kind with that plural."""
        return next((kind.name for kind in self.watched.values() if kind.plural == plural), None)


def registry(cost_label: str) -> Registry:
    """Return the registry of the operator's controllers; `cost_label` is the label that costs are summed by."""
    job = replace(FINETUNE_JOB, view=partial(JobObject.from_api, cost_label=cost_label))
    sweep = replace(FINETUNE_SWEEP, view=partial(SweepObject.from_api, cost_label=cost_label))
    return Registry(job, sweep)


REGISTRY = Registry(FINETUNE_JOB, FINETUNE_SWEEP)
