"""What is proven of a model as it is loaded, with a few tokens: its attention, its loss, and whether rows pack.

No list of names says what a model's code does; its own logits do. All of it is a handful of forward passes without
gradients, of a few dozen tokens each.

Tolerances. Logits are compared less their mean over the vocabulary, which the loss does not see, as a part of their
root mean square: LOSS is what half precision and float32 round to. The same rows in the same shapes give the same
numbers, but that a mixture of experts sorts tokens by expert: what that changes is measured, and LEAK is allowed
beside it. Other shapes and other attention kernels add up in another order: half of all tokens must agree within ALIKE.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
import torch

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.batching import Collate
from finetune_trainer.engine.model_loss import patch_fused_loss, target_logits
from finetune_trainer.errors import ConfigInvalid, is_gpu_out_of_memory, type_and_reason
from finetune_trainer.runtime.precision import mixed_precision
from finetune_trainer.runtime.rng import RngState
from finetune_trainer.runtime.transfer import on_device

log = structlog.get_logger(__name__)
#: By whether the model computes in float32.
LOSS: Final = {True: 1e-4, False: 2**-7}
LEAK: Final = {True: 1e-4, False: 1e-3}
ALIKE: Final = {True: 1e-3, False: 5e-2}
#: What a mixture of experts may change more than it was seen to change.
_NOISE: Final = 4.0
#: Logits below it stand for tokens that the model never says.
_RULED_OUT: Final = -1e4
#: Tokens of each row.
_TOKENS: Final = 12

#: Attention implementations of transformers in the order in which they are tried.
_SLOWER: Final = {"sdpa": 0, "eager": 1}


@dataclass(frozen=True)
class Findings:
    """What the plan must respect.

    Attributes:
        attention: The attention implementation that runs.
        own_loss: Whether the loss is that of the model's own logits.
        packing_problem: Why rows cannot be packed; None if they can, or if it was not asked.
    """

    attention: str
    own_loss: bool
    packing_problem: str | None = None

    @classmethod
    def agreed(cls, found: Sequence["Findings"]) -> "Findings":
        """Return what holds for all processes: numbers on a tolerance's edge may fall on either side of it."""
        return cls(
            max((each.attention for each in found), key=lambda name: _SLOWER.get(name, -1)),
            any(each.own_loss for each in found),
            next((each.packing_problem for each in found if each.packing_problem), None),
        )


def prove(core: Any, spec: FineTuneJobSpec, plan: ExecutionPlan, rows: Sequence[list[int]], pad_id: int) -> Findings:
    """Put a loss on `core` that is the model's own, and find out how it may be trained.

    Args:
        core: A causal language model of transformers, with its weights.
        spec: The job's spec.
        plan: The plan, whose attention and packing are to be proven.
        rows: Token ids of the training rows; a few of them are used.
        pad_id: Token id that fills up padded rows.

    Raises:
        ConfigInvalid: When the model cannot be trained, or not in the way that the spec demands.
    """
    patch_fused_loss(core)
    before, was_training = RngState.now(), core.training
    core.eval()
    try:
        with torch.no_grad(), mixed_precision(core.device, spec.training.precision):
            return _Proof(core, spec, plan, _samples(rows), pad_id).run()
    finally:
        core.train(was_training)
        before.restore()


def _samples(rows: Sequence[list[int]]) -> list[list[int]]:
    """Return three different rows of the data's own tokens: one, another of the same length, and a shorter one."""
    stream = [token for index in range(min(3, len(rows))) for token in rows[index]]
    stream = (stream * (3 * _TOKENS))[: 3 * _TOKENS]
    first, second, third = (stream[start : start + _TOKENS] for start in range(0, 3 * _TOKENS, _TOKENS))
    if first == second:
        second = [token - 1 if token else 1 for token in first]
    return [first, second, third[: _TOKENS - 3]]


class _Proof:
    def __init__(
        self, core: Any, spec: FineTuneJobSpec, plan: ExecutionPlan, samples: list[list[int]], pad_id: int
    ) -> None:
        self._core, self._spec, self._plan, self._pad_id = core, spec, plan, pad_id
        self._exact = spec.training.precision == "fp32"
        self._one, self._other, self._short = samples
        self._own = False

    def run(self) -> Findings:
        attention = self._attention()
        self._loss()
        noise = self._noise()
        self._causality(noise)
        self._training_mode()
        problem = self._packing_problem(noise) if self._plan.packing else None
        return Findings(attention, self._own, problem)

    def _attention(self) -> str:
        """Return the first attention implementation that runs, of the plan's and transformers' own."""
        planned, core = str(self._plan.attention), self._core
        problems = []
        for name in dict.fromkeys((planned, *_SLOWER)):
            try:
                if name != core.config.get_text_config(decoder=True)._attn_implementation:
                    core.set_attn_implementation(name)
                logits = self._logits([self._one, self._short], own=True)
            except Exception as error:
                _raise_if_of_the_gpu(error)
                problems.append(f"{name} fails ({type_and_reason(error)})")
            else:
                if not bool((logits.isnan() | logits.isposinf()).any()):
                    if problems:
                        self._fall_back(name, problems)
                    return name
                problems.append(f"{name} gives NaN or infinity")
        raise ConfigInvalid(f"spec.model.source: the model cannot be computed: {'; '.join(problems)}")

    def _fall_back(self, name: str, problems: list[str]) -> None:
        said = "; ".join(problems)
        if self._spec.model.attention not in ("auto", name):
            raise ConfigInvalid(f"spec.model.attention: {said}; take auto or {name}")
        log.warning(f"Attention: {name}, for {said}")

    def _loss(self) -> None:
        """Compare the logits of our loss with the model's own, and take the model's where they differ."""
        rows = [self._one, self._short]
        own = self._logits(rows, own=True)
        try:
            problem = _compared(self._logits(rows, own=False), own, LOSS[self._exact])
        except Exception as error:
            _raise_if_of_the_gpu(error)
            problem = f"its head is not where others have it ({type_and_reason(error)})"
        if problem:
            self._own = self._core.fused_loss.own = True
            log.warning(f"The loss is that of the model's own logits, which takes more memory: {problem}")

    def _noise(self) -> float:
        """Return what another row in the same batch changes, side by side."""
        return _largest(
            self._logits([self._short, self._one], own=self._own)[: len(self._short) - 1],
            self._logits([self._short, self._other], own=self._own)[: len(self._short) - 1],
        )

    def _causality(self, noise: float) -> None:
        """Refuse a model whose earlier tokens see later ones: it would learn to copy."""
        last = next((token for token in self._other if token != self._one[-1]), self._one[-1])
        changed = [*self._one[:-1], last]
        first, second = (self._logits([row], own=self._own) for row in (self._one, changed))
        if _largest(first, second) > self._allowed(noise):
            raise ConfigInvalid(
                f"spec.model.source: tokens see those that follow them in {self._spec.model.source}: as configured it"
                " is no causal language model (encoders need is_decoder: true in config.json)"
            )

    def _training_mode(self) -> None:
        """Refuse a model whose forward pass asks for more than tokens when it trains."""
        self._core.train()
        try:
            self._logits([self._one, self._short], own=self._own)
        except Exception as error:
            _raise_if_of_the_gpu(error)
            raise ConfigInvalid(
                f"spec.model.source: {self._spec.model.source} cannot be trained on text: {type_and_reason(error)}"
            ) from None
        finally:
            self._core.eval()

    def _packing_problem(self, noise: float) -> str | None:
        """Return why rows cannot be laid end to end, None if the second gives what it gives alone."""
        targets = len(self._short) - 1
        try:
            packed, beside = (
                self._logits([first, self._short], own=self._own, packed=True)[-targets:]
                for first in (self._one, self._other)
            )
        except Exception as error:
            _raise_if_of_the_gpu(error)
            return f"this model does not take packed rows ({type_and_reason(error)})"
        # Whatever the first two tell: ranks that share out the weights compute together.
        alone = self._logits([self._short], own=self._own)
        if _largest(packed, beside) > self._allowed(noise):
            return "rows laid end to end see each other in this model"
        if _typical(packed, alone) > ALIKE[self._exact]:
            return "rows laid end to end do not give what they give alone in this model"
        return None

    def _allowed(self, noise: float) -> float:
        return LEAK[self._exact] + _NOISE * noise

    def _logits(self, rows: list[list[int]], own: bool, packed: bool = False) -> torch.Tensor:
        """Return the logits of all targets of a batch of `rows`."""
        longest = max(map(len, rows))
        batch = Collate(packed, self._pad_id, len(rows), longest)([(row, row) for row in rows])
        return target_logits(self._core, on_device(batch, self._core.device), own)


def _compared(ours: torch.Tensor, own: torch.Tensor, tolerance: float) -> str | None:
    if ours.shape != own.shape:
        return f"its logits have the shape {list(own.shape)}, the head's product {list(ours.shape)}"
    difference = float(_differences(ours, own).square().mean().sqrt())
    return None if difference <= tolerance else f"the head's product differs from them by {difference:.1%}"


def _largest(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(_differences(first, second).max())


def _typical(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(_differences(first, second).median())


def _differences(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return, for each token, how its logits differ as a part of their size; what both rule out does not count."""
    ruled_out = (first < _RULED_OUT) & (second < _RULED_OUT)
    first, second = (each.masked_fill(ruled_out, 0.0) for each in (first, second))
    first, second = (each - each.mean(-1, keepdim=True) for each in (first, second))
    size = second.square().mean(-1).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    found = (first - second).square().mean(-1).sqrt() / size
    return found.nan_to_num(nan=torch.inf)


def _raise_if_of_the_gpu(error: Exception) -> None:
    """Raise what says nothing of the model: memory that is short, a GPU that fails."""
    if is_gpu_out_of_memory(error) or type(error).__name__ == "AcceleratorError":
        raise error
