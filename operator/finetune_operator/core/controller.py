"""What a controller is: see docs/extending/operator-kind.md for how to add one."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, TypeVar

from finetune_operator.core.objects.kinds import Kind
from finetune_operator.core.objects.observed import Observation
from finetune_operator.core.objects.pod import Pod
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.objects.snapshot import ReconciledView, Snapshot, View
from finetune_operator.core.types import Plan
from finetune_operator.settings import Settings

O = TypeVar("O", bound=Observation)  # noqa: E741 -- stands for what one controller observes


@dataclass(frozen=True)
class ChildKind:
    """A kind that a controller creates, or that its children create. The label holds the name of the owner."""

    kind: Kind
    view: Callable[[Raw], View]
    owner_label: str


@dataclass(frozen=True)
class Controller(Generic[O]):
    """One reconciled kind: how to read it, what it owns, and what it needs.

    Attributes:
        kind: The kind it reconciles.
        view: Read an object of that kind.
        children: The kinds to watch for it.
        observe: Turn cached objects into the input of `plan`.
        plan: The pure decision. It must return an empty plan once nothing is left to do.
        keep: Return what of an object stays in memory.
        is_whole: Whether an object that stays in memory is all there; else it is read again for each plan.
        leader: The pod whose /progress becomes `Observation.report`; None while there is none.
    """

    kind: Kind
    view: Callable[[Raw], ReconciledView]
    children: tuple[ChildKind, ...]
    observe: Callable[[Snapshot], O]
    plan: Callable[[O, Settings, datetime], Plan]
    keep: Callable[[Any], ReconciledView] = lambda view: view
    is_whole: Callable[[Any], bool] = lambda view: True
    leader: Callable[[O], Pod | None] = lambda observed: None
