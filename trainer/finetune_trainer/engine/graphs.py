"""Forward and backward passes as CUDA graphs: one launch where Python would launch thousands of kernels.

A pass of few tokens, or of a small model, takes the GPU less time than Python needs to launch its kernels. A graph
(torch.cuda.CUDAGraph) launches them all at once, on the memory that they were captured with, so the sums are those of
the pass that was captured. Weights are read where they lie, and random generators go on as without.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Final

import structlog
import torch

from finetune_trainer.engine.compiled_proof import Relevant
from finetune_trainer.engine.flat import flattened
from finetune_trainer.errors import type_and_reason
from finetune_trainer.runtime.cuda_graphs import capture, leave_capture
from finetune_trainer.runtime.peak_memory import reserved, set_aside
from finetune_trainer.runtime.rng import RngState

log = structlog.get_logger(__name__)
#: Beyond so many shapes a pass runs as ever: each graph takes host memory and a second to capture.
_MOST_GRAPHS: Final = 128
#: What a replayed pass may differ by from the launched one, as a part of the loss and of the gradient's norm: kernels
#: may add in any order.
TOLERANCE: Final = 1e-2
_TINY: Final = 1e-30

#: Returns the loss of a micro-batch on the device; a device scalar holds the targets of the whole step.
Loss = Callable[[dict[str, Any], torch.Tensor], torch.Tensor]


class StepGraphs:
    """Replays the passes of micro-batches, one graph for each shape.

    The first pass of a shape is left to the caller: it compiles, tunes and loads whatever it needs. The second is
    captured, and all passes from then on are replayed. The first replay of each shape is compared with the same pass
    launched. Where that differs, or a capture fails, everything is left to the caller.

    Attributes:
        parameters: What gets a gradient.
        problem: Why nothing is captured anymore; None while all is well.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], loss: Loss, relevant: Relevant = list) -> None:
        """Prepare for passes.

        Args:
            parameters: As of the attribute.
            loss: Computes a pass.
            relevant: Returns what means something of gradients in the latest pass: of some parts nobody reads what a
                pass leaves there.
        """
        self.problem: str | None = None
        self.parameters = list(parameters)
        self._loss, self._relevant = loss, relevant
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, _Pass] = {}
        self._addresses: list[int] = []
        self._gradients: _Gradients | None = None
        self._pool: Any = None
        self._held = 0  # bytes

    def run(self, batch: Mapping[str, Any], targets: torch.Tensor) -> torch.Tensor | None:
        """Return the loss of `batch`, with its gradient added to the parameters'; None if the caller must compute it.

        Args:
            batch: The micro-batch, in host memory or on the device.
            targets: The targets of the whole step, a scalar on the device.
        """
        if self.problem:
            return None
        addresses = [each.data_ptr() for each in self.parameters]
        if addresses != self._addresses:  # the optimizer has moved the weights: graphs read where they were
            self.clear()
            self._addresses = addresses
        key = tuple(_kind(each) for each in batch.items())
        found = self._graphs.get(key)
        if found is None:
            if key not in self._seen or len(self._graphs) >= _MOST_GRAPHS:
                self._seen.add(key)
                return None
            found = self._captured(batch, targets)
            if found is None:
                return None
            self._graphs[key] = found
        loss = found.replay(batch, targets) if found.is_right else self._first_replay(found, batch, targets)
        if loss is None:
            return None
        assert self._gradients is not None
        self._gradients.hand_over(found.used)
        return loss

    def clear(self) -> None:
        """Drop all graphs, and the memory that they hold."""
        self._graphs.clear()
        self._seen.clear()
        self._gradients = self._pool = None
        self._held = 0
        set_aside(0)

    def _captured(self, batch: Mapping[str, Any], targets: torch.Tensor) -> "_Pass | None":
        generators = RngState.now()
        try:
            if self._gradients is None:
                self._gradients = _Gradients(self.parameters)
            before = reserved()
            found = _Pass(batch, targets, self._loss, self._gradients)
            self._pool = found.capture(self._pool)
            self._held += max(0, reserved() - before)
            set_aside(self._held)
        except Exception as error:
            first = error.__context__  # what ended the capture; torch then complains that it ended
            self._give_up(type_and_reason(first if isinstance(first, Exception) else error))
            leave_capture()
            generators.restore()  # the pass that is launched instead draws what it would have
            return None
        return found

    def _first_replay(self, found: "_Pass", batch: Mapping[str, Any], targets: torch.Tensor) -> torch.Tensor | None:
        """Return the loss as `found` replays it; None, with nothing drawn or added, unless launched kernels agree."""
        before = RngState.now()
        replayed = found.replay(batch, targets)
        drawn = RngState.now()
        before.restore()
        loss, norm, difference = found.launch(self._relevant)
        if not math.isfinite(float(loss) + norm) or not norm:  # nothing to compare: the next pass may have more
            before.restore()
            return None  # and not what is unproven: of the trials that share a pass one may be no number, others learn
        off = float((replayed - loss).abs() / loss.abs().clamp(min=_TINY)), difference / norm
        problem = None
        if not all(each <= TOLERANCE for each in off):  # nor NaN
            problem = f"a replayed pass differs from the launched one: loss {off[0]:.1%}, gradient {off[1]:.1%}"
        elif not drawn.same(RngState.now()):
            problem = "a replayed pass does not draw the random numbers of the launched one"
        if problem:
            before.restore()
            self._give_up(problem)
            return None
        told = f"within {max(off):.2g}" if any(off) else "exactly"
        is_first = not any(each.is_right for each in self._graphs.values())
        (log.info if is_first else log.debug)(f"CUDA graphs: the first replayed pass is the launched one {told}")
        found.is_right = True
        return replayed

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        log.warning(f"CUDA graphs disabled, launching each kernel (slower): {problem}")
        self.clear()


class _Gradients:
    """The gradients that a replayed pass leaves, and those of the step that they are added to."""

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self._parameters = parameters
        zeros = [torch.zeros_like(each) for each in parameters]
        self._flat: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.of_pass: list[torch.Tensor] = [*zeros]
        self._of_step: list[torch.Tensor] = [*zeros]
        for dtype in dict.fromkeys(each.dtype for each in zeros):
            places = [place for place, each in enumerate(zeros) if each.dtype == dtype]
            both = [flattened([zeros[place] for place in places]) for _ in range(2)]
            self._flat.append((both[0][0], both[1][0]))
            for (_, views), target in zip(both, (self.of_pass, self._of_step), strict=True):
                for place, view in zip(places, views, strict=True):
                    target[place] = view

    def hand_over(self, used: list[int]) -> None:
        """Add the gradients of the pass to those of the step."""
        members = [self._parameters[place] for place in used]
        if all(each.grad is None for each in self._parameters):
            for of_pass, of_step in self._flat:
                of_step.copy_(of_pass)
            for place, each in zip(used, members, strict=True):
                each.grad = self._of_step[place]
            return
        sums = []
        for each in members:
            if each.grad is None:
                each.grad = torch.zeros_like(each)
            sums.append(each.grad)
        torch._foreach_add_(sums, [self.of_pass[place] for place in used])


class _Pass:
    """One forward and backward pass: captured once, then replayed; `is_right` once a replay was compared."""

    def __init__(self, batch: Mapping[str, Any], targets: torch.Tensor, loss: Loss, gradients: _Gradients) -> None:
        self.is_right = False
        self.used: list[int] = []  # places of the parameters that get a gradient
        self._compute_loss, self._gradients = loss, gradients
        device = targets.device
        self._batch = {
            name: torch.empty_like(each, device=device) if isinstance(each, torch.Tensor) else each
            for name, each in batch.items()
        }
        self._targets = torch.empty_like(targets)
        self._loss = torch.zeros((), device=device)
        self._graph: Any = None
        self._fill(batch, targets)

    def capture(self, pool: Any) -> Any:
        """Capture the pass in the memory of `pool`, the one of all graphs: only one of them runs at a time."""
        self._graph, pool = capture(self._run, pool)
        return pool

    def replay(self, batch: Mapping[str, Any], targets: torch.Tensor) -> torch.Tensor:
        self._fill(batch, targets)
        self._graph.replay()
        return self._loss

    def _fill(self, batch: Mapping[str, Any], targets: torch.Tensor) -> None:
        for name, each in batch.items():
            if isinstance(each, torch.Tensor):
                self._batch[name].copy_(each, non_blocking=True)
        self._targets.copy_(targets)

    def launch(self, relevant: Relevant) -> tuple[torch.Tensor, float, float]:
        """Launch the pass that was replayed last once more.

        Returns:
            Its loss, the norm of its gradient, and the norm of what the replay's gradient differs by.
        """
        loss, found = self._computed()
        launched = relevant(list(found.values()))
        differences = torch._foreach_sub(relevant([self._gradients.of_pass[place] for place in found]), launched)
        norms = [torch.stack(torch._foreach_norm(each)).norm() for each in (launched, differences)]
        return loss.detach(), float(norms[0]), float(norms[1])

    def _computed(self) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """Return the loss, and by their places the gradients of the parameters that it depends on."""
        loss = self._compute_loss(dict(self._batch), self._targets)
        found = torch.autograd.grad(loss, self._gradients._parameters, allow_unused=True)
        return loss, {place: each for place, each in enumerate(found) if each is not None}

    def _run(self) -> None:
        loss, found = self._computed()
        self.used = list(found)
        torch._foreach_copy_([self._gradients.of_pass[place] for place in found], list(found.values()))
        self._loss.copy_(loss.detach())


def _kind(item: tuple[str, Any]) -> Hashable:
    name, value = item
    return (name, value.shape, value.dtype) if isinstance(value, torch.Tensor) else (name, value)
