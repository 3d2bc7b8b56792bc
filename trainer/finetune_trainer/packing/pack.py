"""What the trials of one process share: data, the base model's weights, and the passes through it."""

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

import structlog
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.compilation import compile_layers
from finetune_trainer.engine.model_loss import FOR_SEQUENCES, patch_fused_loss
from finetune_trainer.engine.packed_lora import PackedAdapters
from finetune_trainer.engine.packed_pass import PackedModel, Share, joined
from finetune_trainer.errors import NotPackable, WontFit, copy_of, is_gpu_out_of_memory
from finetune_trainer.model.base import BaseModel
from finetune_trainer.planning.memory import selective_budget
from finetune_trainer.planning.passes import BYTES_IN_PLACE, fewer_places, spec_of_pass
from finetune_trainer.runtime.patches import restore_forward
from finetune_trainer.runtime.peak_memory import release_memory
from finetune_trainer.runtime.precision import mixed_precision, torch_dtype

log = structlog.get_logger(__name__)
T = TypeVar("T")


class Pack:
    """The trials of one process.

    Attributes:
        places: Trials that train at the same time; 1 until the first has planned.
        holds_all: Whether the GPU has memory for the adapters of all trials, so that those that wait keep theirs.
    """

    def __init__(
        self,
        specs: Sequence[FineTuneJobSpec],
        at_once: int,
        tell: Callable[[ExecutionPlan], None] = lambda plan: None,
        halves: bool = False,
    ) -> None:
        """Prepare for trials.

        Args:
            specs: Those of all trials.
            at_once: How many train at the same time at most.
            tell: Gets the plan in effect.
            halves: Whether trials wait for each other at rungs.
        """
        self._specs, self._at_once, self._tell, self._halves = specs, min(at_once, len(specs)), tell, halves
        self._known: dict[Hashable, Any] = {}
        self._failed: dict[Hashable, BaseException] = {}
        self._plan: ExecutionPlan | None = None
        self._base: Any = None
        self._shape: Any = None
        self._model: PackedModel | None = None
        self.places = 1
        self.holds_all = False
        #: Trials in one pass: fewer than there are places once the GPU's memory was too small for all.
        self._in_pass = 1

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """Return what `make` makes; the second trial that asks for it gets what the first got, be it an error."""
        if what in self._failed:
            raise copy_of(self._failed[what], cause=None)
        if what not in self._known:
            try:
                self._known[what] = make()
            except Exception as error:
                self._failed[what] = copy_of(error, cause=None)  # whose frames would hold what was loaded
                raise
        found: T = self._known[what]
        return found

    def plan(
        self, make: Callable[..., ExecutionPlan], spec: FineTuneJobSpec, base: BaseModel, findings: Any
    ) -> ExecutionPlan:
        """Return the plan of the passes: as many places as fit, where a trial's whole micro-batch fits into its own."""
        if self._plan is None or findings is not None:
            self._plan = self._most_places(make, spec, base, findings)
            self._shape = base.shape
            self._tell(self._plan)
        found: ExecutionPlan = self._plan
        return found

    @property
    def together(self) -> int:
        """How many of the first trials are compared with each other at a rung."""
        return len(self._specs) if self.holds_all else self.places

    def _most_places(
        self, make: Callable[..., ExecutionPlan], spec: FineTuneJobSpec, base: BaseModel, findings: Any
    ) -> ExecutionPlan:
        places, plan = self._fitting(make, spec, base, findings)
        if self._halves:
            with suppress(WontFit):
                as_many, holding = self._fitting(make, spec, base, findings, held=len(self._specs))
                self.holds_all = as_many == places
                plan = holding if self.holds_all else plan
        self.places = self._in_pass = places
        if places < self._at_once:
            log.info(f"{places} of {self._at_once} trials train at the same time: more rows do not fit into a pass")
        trained = self._trained(base, spec, places)
        if plan.predicted_peak_memory_bytes and trained:
            more = plan.predicted_peak_memory_bytes + BYTES_IN_PLACE * trained
            plan = plan.model_copy(update={"predicted_peak_memory_bytes": more})
        return plan

    def _fitting(
        self, make: Callable[..., ExecutionPlan], spec: FineTuneJobSpec, base: BaseModel, findings: Any, held: int = 0
    ) -> tuple[int, ExecutionPlan]:
        """Return how many places fit, beside the adapters of `held` trials in all, and the plan of their passes."""
        places = self._at_once
        while True:
            trained, shape = self._trained(base, spec, max(places, held)), base.shape
            shape = replace(shape, trained=trained) if shape and trained else shape
            plan: ExecutionPlan | None = None
            try:
                plan = make(spec_of_pass(spec, places), replace(base, shape=shape), findings=findings)
            except WontFit:
                if places == 1:
                    raise
            fewer = fewer_places(spec, places, plan)
            if plan is not None and fewer == places:
                return places, plan
            places = fewer

    def _trained(self, base: BaseModel, spec: FineTuneJobSpec, trials: int) -> int | None:
        """Return the weights of so many trials at most, given those of the trial `spec`."""
        trained = base.shape.trained if base.shape else None
        largest = sorted((each.lora.rank for each in self._specs), reverse=True)[:trials]
        return trained and trained * sum(largest) // spec.lora.rank

    def own(self, model: Any) -> Any:
        """Return a model for one trial: modules of its own, on the weights of `model`."""
        self._base = model
        _refuse_dropout(model)
        return twin(model)

    def enter(self, place: int, model: Any, spec: FineTuneJobSpec) -> None:
        """Give `place` to the PEFT model of a trial."""
        assert self._plan is not None
        if self._plan.packing and self._plan.attention not in FOR_SEQUENCES:
            raise NotPackable(
                f"spec.training.packing: enabled, but {self._plan.attention} attention only masks other rows, so that"
                " a trial that becomes infinite would spoil others: take auto or disabled"
            )
        if self._model is None:
            dtype = torch_dtype(spec.training.precision)
            rank = max(each.lora.rank for each in self._specs)
            core = twin(self._base)
            self._model = PackedModel(core, PackedAdapters(core, self.places, rank, dtype)).train()
        self._model.adapters.enter(place, model, spec.lora.dropout)

    def leave(self, place: int) -> None:
        if self._model is not None:
            self._model.adapters.leave(place)

    def run(self, shares: Sequence[Share]) -> list[torch.Tensor | BaseException]:
        """Run `shares`, forward and backward, in one pass, or in more of them once the GPU's memory was too small.

        Returns:
            The loss of each share, or why there is none, in their order.
        """
        answers: list[torch.Tensor | BaseException] = []
        while some := shares[len(answers) : len(answers) + self._in_pass]:
            too_many = False
            try:
                answers += self._pass(some)
            except Exception as error:
                too_many = self._may_halve(error, len(some))
                answers += [] if too_many else [copy_of(error, cause=error) for _ in some]
            if too_many:  # not above, where the error still holds what is to be freed
                self._halve(len(some))
        return answers

    def _may_halve(self, error: Exception, trials: int) -> bool:
        """Return whether fewer trials in a pass may help. One that is alone in it takes smaller parts of its step."""
        fails = self._specs[0].recovery.on_out_of_memory == "Fail"
        return trials > 1 and not fails and is_gpu_out_of_memory(error)

    def _halve(self, trials: int) -> None:
        assert self._plan is not None
        self._in_pass = (trials + 1) // 2
        log.warning(f"The GPU ran out of memory with {trials} trials in a pass: retrying with {self._in_pass}")
        release_memory()
        rows = max(1, (self._plan.micro_batch_size or 1) // self.places)
        self._tell(self._plan.model_copy(update={"micro_batch_size": rows * self._in_pass}))

    def _pass(self, shares: Sequence[Share]) -> list[torch.Tensor]:
        """Run one pass, forward and backward; return each share's loss."""
        assert self._model is not None and self._plan is not None
        model, spec = self._model, self._specs[0]
        rows = max(1, (self._plan.micro_batch_size or 1) // self.places)
        inputs = joined(shares, self.places, rows)
        try:
            if "compiled" not in self._known:
                budget = selective_budget(self._shape, spec, self._plan.tokens_per_pass or 1) if self._shape else 1.0
                self._known["compiled"] = compile_layers(model, self._plan, inputs, spec.training.precision, budget)
                model.adapters.clear()
            with mixed_precision(model.device, spec.training.precision):
                total = model(**inputs)
            total.backward()
            model.adapters.give_gradients([each.place for each in shares])
        finally:
            model.adapters.clear()
        return list(model.losses.unbind())


def twin(model: Any) -> Any:
    """Return a copy of the modules of `model`, on the very same weights."""
    shared: dict[int, Any] = {id(each): each for each in chain(model.parameters(), model.buffers())}
    for module in model.modules():
        shared |= {id(each): each for each in vars(module).values() if _holds_weights(each)}
    found = copy.deepcopy(model, shared)
    restore_forward(found)
    own = found.fused_loss.own
    del found.fused_loss
    patch_fused_loss(found)  # its forward pass was that of `model`
    found.fused_loss.own = own
    return found


def _holds_weights(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or hasattr(value, "absmax")  # bitsandbytes' QuantState


def _refuse_dropout(model: Any) -> None:
    """Refuse a base that drops by itself: masks of one trial would depend on who trains beside it."""
    text = model.config.get_text_config(decoder=True)
    drops = [name for name, each in model.named_modules() if isinstance(each, torch.nn.Dropout) and each.p > 0]
    if getattr(text, "attention_dropout", 0):
        drops.append("attention_dropout")
    if drops:
        raise NotPackable(f"spec.model.source: trials cannot share this model, which drops by itself ({drops[0]})")
