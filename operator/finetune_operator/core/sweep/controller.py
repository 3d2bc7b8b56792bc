"""The controller of FineTuneSweeps."""

from finetune_api import constants
from finetune_operator.core.controller import ChildKind, Controller
from finetune_operator.core.objects import kinds
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.core.sweep.observed import ObservedSweep, SweepObject, observe
from finetune_operator.core.sweep.plan import plan

FINETUNE_SWEEP: Controller[ObservedSweep] = Controller(
    kind=kinds.FINETUNE_SWEEP,
    view=SweepObject.from_api,
    keep=SweepObject.kept,
    is_whole=lambda sweep: sweep.is_whole,
    children=(ChildKind(kinds.FINETUNE_JOB, JobObject.from_api, constants.LABEL_SWEEP),),
    observe=observe,
    plan=plan,
)
