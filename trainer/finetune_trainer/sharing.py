"""What a run may share with others in its process: nothing, unless several trials of a sweep run in one."""

from collections.abc import Callable, Hashable, Mapping
from functools import partial
from typing import Any, Protocol, TypeVar

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan

T = TypeVar("T")


class Place(Protocol):
    """Where a trial's micro-batches go through the model together with those of others."""

    #: How the trial's own steps are laid out in the passes.
    plan: ExecutionPlan

    def mean_loss(self, batch: Mapping[str, Any], targets: Any) -> Any:
        """Run a micro-batch forward and backward; return its part of the step's loss, a mean over `targets`."""
        ...


class Sharing:
    """A run on its own: it makes all that it needs."""

    @property
    def is_alone(self) -> bool:
        """Whether the process ends with the run."""
        return True

    @property
    def halves(self) -> bool:
        """Whether the run is compared with others, and ends when it falls behind."""
        return False

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` makes, which runs of one process share under the name `what`."""
        return make()

    def pinned_commit(self, own: Callable[[], str | None]) -> str | None:
        """Return the hub's commit of the base model that an earlier attempt trained on; `own` asks the run's own."""
        return own()

    def planner(
        self, make: Callable[..., ExecutionPlan], spec: FineTuneJobSpec, base: Any
    ) -> Callable[..., ExecutionPlan]:
        """Return the function that plans the passes; it takes what was proven of the model (engine.proof.Findings)."""
        return partial(make, spec, base)

    def own(self, model: Any) -> Any:
        """Return a model with the weights of `model` that may be given an adapter."""
        return model

    def is_rung(self, step: int) -> bool:
        """Return whether the run is compared with others at `step`."""
        return False

    def why_stopped(self, step: int, eval_loss: float) -> str:
        """Return why the run ends at the rung `step`, where its held-out loss is `eval_loss`; empty if it goes on."""
        return ""

    def take_place(self, model: Any, plan: ExecutionPlan) -> Place | None:
        """Return the place of the PEFT model among others; None for a run that trains its model itself."""
        return None
