"""What one trial shares with the others of its process, and its turn among them."""

from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.packed_pass import Share
from finetune_trainer.errors import WontFit, is_gpu_out_of_memory
from finetune_trainer.packing.halving import AtRung
from finetune_trainer.packing.pack import Pack
from finetune_trainer.packing.turns import Turns
from finetune_trainer.runtime.device import seed
from finetune_trainer.sharing import Place, Sharing

T = TypeVar("T")
Turn = Turns[Share | AtRung, torch.Tensor | str]


@dataclass
class Seat(Sharing):
    """What one trial shares with the others of its pack.

    Attributes:
        pack: All trials of the process.
        place: Its place among those that train at the same time; another one after it has waited at a rung.
        spec: Its spec.
        turn: Gives the turn away while the others come to the same point.
        rungs: The steps at which it is compared with others.
        others_commit: Returns the commit of the base on which any of them was trained in an earlier attempt.
    """

    pack: Pack
    place: int
    spec: FineTuneJobSpec
    turn: Turn
    rungs: Collection[int] = ()
    others_commit: Callable[[], str | None] = lambda: None
    _model: Any = field(default=None, init=False)

    @property
    def is_alone(self) -> bool:
        return False

    @property
    def halves(self) -> bool:
        return bool(self.rungs)

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        return self.pack.once(what, make)

    def pinned_commit(self, own: Callable[[], str | None]) -> str | None:
        return self.once("commit", lambda: own() or self.others_commit())

    def planner(
        self, make: Callable[..., ExecutionPlan], spec: FineTuneJobSpec, base: Any
    ) -> Callable[..., ExecutionPlan]:
        return lambda findings=None: self.pack.plan(make, spec, base, findings)

    def own(self, model: Any) -> Any:
        found = self.pack.own(model)
        seed(self.spec.training.seed)
        return found

    def is_rung(self, step: int) -> bool:
        return step in self.rungs

    def why_stopped(self, step: int, eval_loss: float) -> str:
        return str(self.turn.wait(AtRung(step, eval_loss)))

    def take_place(self, model: Any, plan: ExecutionPlan) -> Place:
        self._model = model
        self.sit_at(self.place)
        return _Place(self, _of_one(plan, self.pack.places, self.spec))

    def sit_at(self, place: int) -> None:
        """Take `place` for the trial's model.

        Raises:
            WontFit: The GPU's memory is full. OutOfMemoryError would ask for a smaller micro-batch, which is no place.
        """
        self.place = place
        try:
            self.pack.enter(place, self._model, self.spec)
        except Exception as error:
            if not is_gpu_out_of_memory(error):
                raise
            raise WontFit("The GPU has no memory left for another trial's adapter: it has to train alone") from error


@dataclass
class _Place:
    """See sharing.Place."""

    seat: Seat
    plan: ExecutionPlan

    def mean_loss(self, batch: Mapping[str, Any], targets: torch.Tensor) -> torch.Tensor:
        seat = self.seat
        drawn = int(torch.randint(-(2**31), 2**31, ())) if seat.spec.lora.dropout else 0
        loss = seat.turn.wait(Share(seat.place, batch, 1 / targets, drawn))
        assert isinstance(loss, torch.Tensor)
        return loss


def _of_one(plan: ExecutionPlan, places: int, spec: FineTuneJobSpec) -> ExecutionPlan:
    """Return how the steps of one trial are laid out in passes that are laid out as `plan`."""
    batch, most = spec.training.batch_size, max(1, (plan.micro_batch_size or 1) // places)
    micro = next(size for size in range(min(most, batch), 0, -1) if batch % size == 0)
    return plan.model_copy(update={"micro_batch_size": micro, "gradient_accumulation_steps": batch // micro})
