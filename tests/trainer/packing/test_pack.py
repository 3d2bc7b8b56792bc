"""Several adapters on one base in one pass: each has the loss and the gradients that it has alone."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from finetune_api.exit_codes import ExitCode
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_api.sweep import Halving
from finetune_trainer.data.batching import Collate
from finetune_trainer.data.encoding import IGNORE
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.engine.packed_lora import PackedAdapters
from finetune_trainer.engine.packed_pass import PackedModel, Share, joined
from finetune_trainer.errors import ConfigInvalid, TrainerError, WontFit, copy_of, failure_of
from finetune_trainer.evaluation.lockstep import EvaluationAborted
from finetune_trainer.packing.halving import AtRung
from finetune_trainer.packing.pack import Pack, _refuse_dropout, twin
from finetune_trainer.packing.seat import Seat, _of_one
from finetune_trainer.packing.trials import TrialRunner
from finetune_trainer.packing.turns import Turns
from finetune_trainer.runtime.signals import StopFlag
from finetune_trainer.settings import Environment

SPEC = FineTuneJobSpec.model_validate(
    {
        "model": {"source": "hf://org/model"},
        "dataset": {"train": "s3://data/train.jsonl"},
        "training": {"batchSize": 4},
        "output": {"uri": "s3://out"},
    }
)
QKV = ["q_proj", "k_proj", "v_proj", "o_proj"]
#: Rank, alpha and layers of three trials; their rows by length.
TRIALS = ((4, 8, QKV), (16, 16, ["q_proj", "down_proj"]), (2, 8, ["v_proj", "gate_proj", "up_proj"]))
ROWS = ((5, 9), (7,), (3, 4, 11))


def _config(**changes: Any) -> MistralConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MistralConfig(**sizes, **heads, attn_implementation="sdpa", **changes)


@functools.cache
def _base() -> Any:
    torch.manual_seed(0)
    base = MistralForCausalLM(_config())
    patch_fused_loss(base)
    return base.requires_grad_(False)


def _trial(rank: int, alpha: int, layers: list[str]) -> Any:
    torch.manual_seed(rank)
    adapted = get_peft_model(twin(_base()), LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    return adapted


def _batch(lengths: tuple[int, ...], packed: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length in lengths:
        ids = torch.randint(1, 50, (length,), generator=generator).tolist()
        rows.append((ids, [IGNORE, *ids[1:]]))
    return Collate(packed, 0)(rows)


def _gradients(adapted: Any) -> list[torch.Tensor]:
    return [each.grad for each in adapted.parameters() if each.requires_grad]


def _alone(adapted: Any, batch: dict[str, Any]) -> tuple[float, list[torch.Tensor]]:
    adapted.zero_grad()
    loss = adapted(**batch) / len(batch["target_ids"])
    loss.backward()
    return loss.item(), [each.clone() for each in _gradients(adapted)]


def _together(
    trials: dict[int, Any],
    packed: bool,
    dropout: float = 0.0,
    seeds: tuple[int, ...] = (1, 2, 3),
    places: int = 4,
    few_shapes: bool = False,
) -> dict[int, tuple[float, list[torch.Tensor]]]:
    core = twin(_base())
    model = PackedModel(core, PackedAdapters(core, places, 16, torch.float32)).train()
    shares = []
    for place, adapted in sorted(trials.items()):
        adapted.zero_grad()
        model.adapters.enter(place, adapted, dropout)
        batch = _batch(ROWS[place], packed)
        shares.append(Share(place, batch, 1 / torch.tensor(len(batch["target_ids"])), seeds[place]))
    for _ in range(2):  # gradients add up, as over the micro-batches of a step
        model.adapters.load()
        model(**joined(shares, places, 3, few_shapes)).backward()
        model.adapters.give_gradients(list(trials))
    losses = model.losses.tolist()
    return {place: (losses[place], [each / 2 for each in _gradients(trials[place])]) for place in trials}


@pytest.mark.parametrize(
    ("packed", "few_shapes", "places"),
    [(True, False, 4), (True, True, 4), (True, True, 3), (False, False, 4)],
    ids=["packed", "filled up", "filled up, the last place taken", "padded"],
)
def test_each_trial_has_the_loss_and_gradients_that_it_has_alone(packed: bool, few_shapes: bool, places: int) -> None:
    trials = {place: _trial(*each) for place, each in enumerate(TRIALS)}
    expected = {place: _alone(adapted, _batch(ROWS[place], packed)) for place, adapted in trials.items()}
    found = _together(trials, packed, few_shapes=few_shapes, places=places)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_one_that_becomes_infinite_spoils_none_beside_it() -> None:
    """Packed rows need an attention that knows sequences, as GPUs have: one that masks multiplies by 0."""
    trials = {place: _trial(*each) for place, each in enumerate(TRIALS)}
    expected = _together(trials, False)
    for weight in trials[1].parameters():
        if weight.requires_grad:
            weight.data.fill_(torch.nan)
    found = _together(trials, False)
    assert not torch.isfinite(torch.tensor(found[1][0]))
    torch.testing.assert_close({0: found[0], 2: found[2]}, {0: expected[0], 2: expected[2]})


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_what_a_trial_drops_depends_on_its_own_seed_and_tokens_alone(packed: bool) -> None:
    trials = {place: _trial(*each) for place, each in enumerate(TRIALS)}
    beside = _together(trials, packed, dropout=0.5)[1]
    alone = _together({1: trials[1]}, packed, dropout=0.5, seeds=(0, 2, 0))[1]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-6)
    other = _together({1: trials[1]}, packed, dropout=0.5, seeds=(0, 3, 0))[1]
    assert other[0] != pytest.approx(alone[0], rel=1e-4)
    assert _together({1: trials[1]}, packed)[1][0] != pytest.approx(alone[0], rel=1e-4)


def test_a_place_that_is_left_takes_the_next_trial() -> None:
    core = twin(_base())
    adapters = PackedAdapters(core, 1, 16, torch.float32)
    model = PackedModel(core, adapters).train()
    for trial in TRIALS[:2]:
        adapted = _trial(*trial)
        adapters.enter(0, adapted, 0.0)
        batch = _batch(ROWS[0], True)
        expected, gradients = _alone(adapted, batch)
        adapted.zero_grad()
        adapters.load()
        model(**joined([Share(0, batch, 1 / torch.tensor(len(batch["target_ids"])))], 1, 2)).backward()
        adapters.give_gradients([0])
        assert float(model.losses[0]) == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(_gradients(adapted), gradients, rtol=1e-4, atol=1e-6)
        adapters.leave(0)


def test_twins_have_modules_of_their_own_on_the_same_weights() -> None:
    base, other = _base(), twin(_base())
    assert all(a is b for a, b in zip(base.parameters(), other.parameters(), strict=True))
    assert not set(base.modules()) & set(other.modules())
    adapted = _trial(*TRIALS[0])
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(base(input_ids=ids).logits, other(input_ids=ids).logits)
    assert not torch.equal(adapted(input_ids=ids).logits, other(input_ids=ids).logits)


def test_a_base_that_drops_by_itself_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"drops by itself \(attention_dropout\)"):
        _refuse_dropout(MistralForCausalLM(_config(attention_dropout=0.1)))


def test_adapters_that_are_more_than_plain_lora_are_refused() -> None:
    adapted = get_peft_model(twin(_base()), LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(ConfigInvalid, match=r"adapters on linear layers alone, and model\.embed_tokens is none"):
        PackedAdapters(twin(_base()), 1, 16, torch.float32).enter(0, adapted, 0.0)


@pytest.mark.parametrize(
    ("fits", "places", "micro"), [(64, 4, 4), (13, 2, 4), (8, 2, 4), (6, 1, 4), (2, 1, 2)], ids=str
)
def test_so_many_trials_share_a_pass_as_whole_steps_of_each_fit(fits: int, places: int, micro: int) -> None:
    """`fits`: rows that the GPU takes at one time; a step of each trial has four."""

    def make(spec: FineTuneJobSpec, base: Any, tried: bool = False, **_: Any) -> ExecutionPlan:
        rows = spec.training.batch_size
        assert spec.training.cuda_graphs == ("enabled" if tried else "disabled")
        size = next(size for size in range(min(rows, fits), 0, -1) if rows % size == 0)
        return ExecutionPlan(
            micro_batch_size=size, gradient_accumulation_steps=rows // size, predicted_peak_memory_bytes=1
        )

    pack = Pack([SPEC] * 6, at_once=4)
    plan = _of_one(pack.plan(make, SPEC, _Inspected(), None), pack.places, SPEC)
    assert (pack.places, plan.micro_batch_size) == (places, micro)
    assert plan.gradient_accumulation_steps == 4 // micro


def test_a_process_that_must_stop_decides_on_no_trial(tmp_path: Path) -> None:
    """Those that are compared with it leave before they come to the rung."""
    halving, stop = Halving(rungs=[10], reduction_factor=2), StopFlag()
    runner = TrialRunner([], 2, Environment.from_env({}), stop, tmp_path, {}, halving)
    waiting, losses = {1: AtRung(10, 0.5)}, [{}, {10: 0.5}]
    assert runner._decided(waiting, {0, 1}, losses, 2) == {}
    assert runner._decided(waiting, {1}, losses, 2) == {1: ""}
    stop.set("SIGTERM")
    stop.disarm()
    assert isinstance(runner._decided(waiting, {0, 1}, losses, 2)[1], EvaluationAborted)


@dataclass
class _Inspected:
    """As much of a BaseModel as the plan of a pack reads."""

    shape: Any = None


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


class _SmallGpu(Pack):
    """A pack on a GPU that takes so many trials in a pass; some trials are bugs."""

    def __init__(self, fits: int, spec: FineTuneJobSpec = SPEC, bugs: tuple[int, ...] = ()) -> None:
        self.told: list[int | None] = []
        super().__init__([spec] * 8, 8, lambda plan: self.told.append(plan.micro_batch_size))
        self.fits, self.bugs, self.passes = fits, bugs, list[list[int]]()
        self._plan, self.places, self._in_pass = ExecutionPlan(micro_batch_size=32), 8, 8

    def _pass(self, shares: Sequence[Share]) -> list[torch.Tensor]:
        places = [share.place for share in shares]
        if len(places) > self.fits:
            raise OutOfMemoryError("CUDA out of memory")
        if bug := set(places) & set(self.bugs):
            raise ValueError(f"a bug in {bug}")
        self.passes.append(places)
        return [torch.tensor(float(place)) for place in places]

    def answers(self, places: int) -> list[object]:
        found = self.run([Share(place, {}, torch.ones(())) for place in range(places)])
        return [float(each) if isinstance(each, torch.Tensor) else type(each).__name__ for each in found]


def test_a_pass_that_does_not_fit_is_made_of_fewer_trials_and_no_trial_notices() -> None:
    """Each has its whole micro-batch still: what it adds up, and whom it is compared with, stays as it was."""
    pack = _SmallGpu(fits=3)
    assert pack.answers(8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert pack.passes == [[0, 1], [2, 3], [4, 5], [6, 7]] and pack.told == [16, 8] and pack.places == 8
    pack.passes.clear()
    assert pack.answers(3) == [0, 1, 2] and pack.passes == [[0, 1], [2]], "it stays so"


def test_one_that_is_alone_in_its_pass_is_told_and_takes_none_along() -> None:
    assert _SmallGpu(fits=0).answers(3) == ["OutOfMemoryError"] * 3
    pack = _SmallGpu(fits=2, bugs=(4,))
    assert pack.answers(6) == [0, 1, 2, 3, "ValueError", "ValueError"]


def test_a_pack_that_is_to_fail_when_memory_runs_out_does() -> None:
    spec = SPEC.model_copy(update={"recovery": SPEC.recovery.model_copy(update={"on_out_of_memory": "Fail"})})
    pack = _SmallGpu(fits=2, spec=spec)
    assert pack.answers(3) == ["OutOfMemoryError"] * 3 and not pack.told


def test_what_all_trials_share_fails_once_for_all_in_the_same_words() -> None:
    """Not again for each: two dozen trials would wait for a store that does not answer, one after the other."""

    class Picky(TrainerError):
        exit_code = ExitCode.UNAVAILABLE

        def __init__(self, host: str, port: int) -> None:
            super().__init__(f"{host} does not answer")
            self.port = port

    tries: list[int] = []

    def fetch() -> int:
        tries.append(1)
        raise Picky("hub", 443)

    pack = Pack([SPEC] * 2, 2)
    assert isinstance(copy_of(OSError(28, "full"), None), OSError)
    for error in (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), OSError(28, "full", "file"), _of_pydantic()):
        assert str(copy_of(error, error)) == str(error), "whatever it is, it is told"
    for _ in range(3):
        with pytest.raises(Picky, match="hub does not answer") as found:
            pack.once("model", fetch)
        assert (failure_of(found.value).exit_code, found.value.port) == (69, 443)
    assert len(tries) == 1
    assert pack.once("data", lambda: 7) == 7


@pytest.mark.parametrize("again", [False, True], ids=["at first", "after a rung"])
def test_an_adapter_for_which_the_gpu_has_no_memory_left_is_to_train_alone(
    again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rung, too: one that only took smaller micro-batches would train on without a place, and learn nothing."""

    def full(*_: Any) -> None:
        raise OutOfMemoryError("CUDA out of memory")

    pack = Pack([SPEC] * 2, 2)
    monkeypatch.setattr(pack, "enter", full)
    seat = Seat(pack, 0, SPEC, Turns("a", lambda turn: None))
    with pytest.raises(WontFit, match="no memory left for another trial's adapter"):
        seat.sit_at(1) if again else seat.take_place(None, ExecutionPlan())


@pytest.mark.parametrize("of", ["the first", "the second"])
def test_gradients_that_the_memory_is_too_small_for_are_given_to_no_trial(
    of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass is run again: the trial that had its gradient already would have it twice."""
    trials = {place: _trial(*each) for place, each in enumerate(TRIALS[:2])}
    core = twin(_base())
    adapters = PackedAdapters(core, 2, 16, torch.float32)
    for place, adapted in trials.items():
        adapters.enter(place, adapted, 0.0)
    full = {id(each) for each in trials[of == "the second"].parameters()}
    allocate = torch.empty_like

    def empty_like(like: torch.Tensor, **options: Any) -> torch.Tensor:
        if id(like) in full:
            raise OutOfMemoryError("CUDA out of memory")
        return allocate(like, **options)

    monkeypatch.setattr(torch, "empty_like", empty_like)
    with pytest.raises(OutOfMemoryError):
        adapters.give_gradients([0, 1])
    assert all(each is None for adapted in trials.values() for each in _gradients(adapted))


def test_a_trial_that_the_memory_is_too_small_for_leaves_the_others_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It brings layers that no other trial has adapters on, and there is room for some of them."""
    first, late = _trial(*TRIALS[0]), _trial(*TRIALS[1])
    core = twin(_base())
    model = PackedModel(core, PackedAdapters(core, 2, 16, torch.float32)).train()
    batch = _batch(ROWS[0], False)
    share = Share(0, batch, 1 / torch.tensor(len(batch["target_ids"])), 1)
    model.adapters.enter(0, first, 0.5)

    def loss() -> float:
        model.adapters.load()
        model(**joined([share], 2, 2)).backward()
        model.adapters.clear()
        return float(model.losses[0])

    before, allocate = loss(), torch.tensor
    for fails_at in range(1, 3):
        calls = []

        def tensor(*arguments: Any, fails_at: int = fails_at, calls: list[int] = calls, **options: Any) -> torch.Tensor:
            calls.append(1)
            if len(calls) == fails_at:
                raise OutOfMemoryError("CUDA out of memory")
            return allocate(*arguments, **options)

        with monkeypatch.context() as patched, pytest.raises(OutOfMemoryError):
            patched.setattr(torch, "tensor", tensor)
            model.adapters.enter(1, late, 0.0)
        model.adapters.leave(1)
        assert loss() == before


def _of_pydantic() -> Exception:
    try:
        ExecutionPlan.model_validate({"microBatchSize": "many"})
    except ValueError as error:
        return error
    raise AssertionError
