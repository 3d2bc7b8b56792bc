"""What the trials of one process share: data, the base model's weights, and the passes through it."""

import copy
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import structlog
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.engine.compilation import compile_layers
from finetune_trainer.engine.graphs import StepGraphs
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.engine.packed_lora import PackedAdapters
from finetune_trainer.engine.packed_pass import PackedModel, Share, joined
from finetune_trainer.errors import NotPackable, copy_of, is_gpu_out_of_memory
from finetune_trainer.model.architecture import FOR_SEQUENCES
from finetune_trainer.model.base import BaseModel
from finetune_trainer.packing.fitting import fit
from finetune_trainer.planning.cost import waits_for_host
from finetune_trainer.planning.memory import selective_budget
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
        self._graphs: StepGraphs | None = None

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
            fits = fit(self._specs, self._at_once, self._halves, partial(make, findings=findings), spec, base)
            assert fits.plan is not None
            self._plan, self.holds_all, self._shape = fits.plan, fits.holds_all, base.shape
            self.places = self._in_pass = fits.places
            self._tell(self._plan)
        found: ExecutionPlan = self._plan
        return found

    @property
    def together(self) -> int:
        """How many of the first trials are compared with each other at a rung."""
        return len(self._specs) if self.holds_all else self.places

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
            too_much = False
            try:
                answers += self._pass(some)
            except Exception as error:
                too_much = self._may_take_less(error, len(some))
                answers += [] if too_much else [copy_of(error, cause=error) for _ in some]
            if too_much:  # not above, where the error still holds what is to be freed
                self._take_less(len(some))
        return answers

    def _may_take_less(self, error: Exception, trials: int) -> bool:
        """Return whether another try may fit. A trial that is alone in its pass takes smaller parts of its step."""
        fails = self._specs[0].recovery.on_out_of_memory == "Fail"
        return (trials > 1 or self._captures) and not fails and is_gpu_out_of_memory(error)

    def _take_less(self, trials: int) -> None:
        """Go on without CUDA graphs, or else with fewer trials in a pass."""
        assert self._plan is not None
        if self._captures:
            log.warning("The GPU ran out of memory: retrying without CUDA graphs")
            self._without_graphs()
        else:
            self._in_pass = (trials + 1) // 2
            log.warning(f"The GPU ran out of memory with {trials} trials in a pass: retrying with {self._in_pass}")
            rows = max(1, (self._plan.micro_batch_size or 1) // self.places)
            self._tell(self._plan.model_copy(update={"micro_batch_size": rows * self._in_pass}))
        release_memory()

    @property
    def _captures(self) -> bool:
        """Whether passes are replayed as CUDA graphs."""
        return bool(self._plan and self._plan.captured)

    def _waits_for_host(self, shares: Sequence[Share]) -> bool:
        """Return whether a pass takes the host longer than the GPU, as those of the last trials left do."""
        if not self._shape:
            return True
        tokens = sum(each.batch["input_ids"].numel() for each in shares)
        return waits_for_host(tokens, self._shape, bool(self._plan and self._plan.compiled))

    def _without_graphs(self) -> None:
        assert self._plan is not None
        if self._graphs:
            self._graphs.clear()
        self._graphs = None
        self._plan = self._plan.model_copy(update={"captured": False})
        self._tell(self._plan)

    def _pass(self, shares: Sequence[Share]) -> list[torch.Tensor]:
        """Run one pass, forward and backward; return each share's loss."""
        assert self._model is not None and self._plan is not None
        model, spec = self._model, self._specs[0]
        rows = max(1, (self._plan.micro_batch_size or 1) // self.places)
        captures = self._captures and self._waits_for_host(shares)
        inputs = joined(shares, self.places, rows, captures)
        try:
            model.adapters.load()
            if "compiled" not in self._known:
                budget = selective_budget(self._shape, spec, self._plan.tokens_per_pass or 1) if self._shape else 1.0
                how = spec.training.precision, budget
                self._known["compiled"] = compile_layers(model, self._plan, inputs, *how, relevant=model.relevant)
                model.adapters.clear()
            if not (captures and self._replay(inputs)):
                self._loss(_without(inputs, "slopes"), inputs["slopes"]).backward()
            # One by one: a list as an index would be copied to the device, which waits for it.
            losses = [model.losses[each.place].clone() for each in shares]
            model.adapters.give_gradients([each.place for each in shares])  # last: what fails is run again
        finally:
            model.adapters.clear()
        return losses

    def _loss(self, inputs: dict[str, Any], slopes: torch.Tensor) -> torch.Tensor:
        assert self._model is not None
        with mixed_precision(self._model.device, self._specs[0].training.precision):
            loss: torch.Tensor = self._model(slopes=slopes, **inputs)
        return loss

    def _replay(self, inputs: dict[str, Any]) -> bool:
        """Run the pass as a CUDA graph, if it is or can be one; return whether it was run."""
        assert self._model is not None
        stacks = self._model.adapters.stacks
        if self._graphs is None or len(self._graphs.parameters) != len(stacks):
            self._graphs = StepGraphs(
                stacks,
                lambda batch, slopes: self._loss(_without(batch, "drops"), slopes),
                relevant=self._model.relevant,
            )
        batch = _without(inputs, "slopes") | {"drops": self._model.adapters.drops}  # which a graph holds for good
        done = self._graphs.run(batch, inputs["slopes"]) is not None
        if self._graphs.problem:
            self._without_graphs()
        return done


def _without(inputs: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: each for key, each in inputs.items() if key != name}


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
