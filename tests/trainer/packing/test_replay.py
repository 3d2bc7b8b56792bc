"""Passes of several trials replayed as CUDA graphs. A CPU has none: a replay runs again what was captured."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.batching import Collate
from finetune_trainer.data.encoding import IGNORE
from finetune_trainer.engine import attention, graphs
from finetune_trainer.engine.model_loss import patch_fused_loss
from finetune_trainer.engine.packed_pass import Share
from finetune_trainer.model import grouped_experts
from finetune_trainer.packing import pack as module
from finetune_trainer.packing.pack import Pack, twin
from support.trainer.captures import replay_by_running_again
from support.trainer.varlen import as_in_2_13

PLACES = 2
#: Of each pass, the lengths of each trial's rows; where there is None, the place is empty.
PASSES: Sequence[tuple[tuple[int, ...] | None, ...]] = (
    ((30, 20), (41, 3)),
    ((25, 25), (40, 4)),
    ((12, 30), (22, 31)),
    (None, (50, 20)),
    (None, (33, 35)),
    ((40, 40), (60, 70)),
    ((44, 40), (60, 64)),
)


def _spec(rank: int, dropout: float) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://org/model"},
            "dataset": {"train": "s3://data/train.jsonl"},
            "training": {"batchSize": 2, "precision": "fp32"},
            "lora": {"rank": rank, "dropout": dropout},
            "output": {"uri": "s3://out"},
        }
    )


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    attention.register()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    found = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=None, attn_implementation="varlen"))
    patch_fused_loss(found)
    return found.requires_grad_(False)


class _Trials(Pack):
    """A pack whose plan is given."""

    def __init__(self, base: Any, captured: bool, dropout: float) -> None:
        self.specs = [_spec(rank, dropout) for rank in (4, 16, 8)]
        self.told: list[bool | None] = []
        super().__init__(self.specs, PLACES, lambda plan: self.told.append(plan.captured))
        self._plan = ExecutionPlan(
            micro_batch_size=2 * PLACES, packing=True, attention="varlen", compiled=False, captured=captured
        )
        self.places, self._in_pass = PLACES, PLACES
        self.trials = []
        for number, spec in enumerate(self.specs):
            torch.manual_seed(number)
            model = get_peft_model(self.own(base), LoraConfig(r=spec.lora.rank, target_modules=["q_proj", "up_proj"]))
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.data.normal_(std=0.1)
            self.trials.append(model)

    def steps(self) -> Iterator[list[torch.Tensor]]:
        """Run all passes; the third trial takes the first one's place on the way. Yields losses and gradients."""
        seated = {0: 0, 1: 1}
        for place, number in seated.items():
            self.enter(place, self.trials[number], self.specs[number])
        for index, lengths in enumerate(PASSES):
            if lengths[0] is None and seated.pop(0, None) is not None:
                self.leave(0)
            if lengths[0] is not None and 0 not in seated:
                seated[0] = 2
                self.enter(0, self.trials[2], self.specs[2])
            shares = []
            for place, rows in enumerate(lengths):
                if rows is not None:
                    batch = _batch(rows, index)
                    shares.append(Share(place, batch, 1 / torch.tensor(len(batch["target_ids"])), index * 7 + place))
            found: list[Any] = self.run(shares)
            for number in seated.values():
                weights = [each for each in self.trials[number].parameters() if each.requires_grad]
                found += [each.grad.clone() for each in weights]
                with torch.no_grad():
                    for each in weights:
                        each -= 0.1 * each.grad
                self.trials[number].zero_grad()
            yield found


def _batch(lengths: Sequence[int], seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(1, 50, (length,), generator=generator).tolist() for length in lengths]
    return Collate(True, 0, rows=2, longest=80)([(ids, [IGNORE, *ids[1:]]) for ids in drawn])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_replayed_passes_have_the_losses_and_gradients_of_launched_ones(
    base: Any, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights move, a trial leaves, and another one takes its place."""
    captures = replay_by_running_again(monkeypatch)
    expected = list(_Trials(twin(base), False, dropout).steps())
    pack = _Trials(twin(base), True, dropout)
    found = list(pack.steps())
    assert len(captures) == 3, "of 128 tokens with both trials and with one, and of 256 tokens"
    assert pack.told == [] and pack._graphs is not None and pack._graphs.problem is None
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_graphs_are_the_first_to_go_when_memory_runs_out(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replay_by_running_again(monkeypatch)
    expected = list(_Trials(twin(base), False, 0.0).steps())

    def full(self: Any, *_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    pack = _Trials(twin(base), True, 0.0)
    monkeypatch.setattr(module.StepGraphs, "run", full)
    found = list(pack.steps())
    assert pack.told == [False] and pack._in_pass == PLACES
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_graphs_that_compute_something_else_are_given_up(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = replay_by_running_again(monkeypatch)
    expected = list(_Trials(twin(base), False, 0.0).steps())
    replay = graphs._Pass.replay
    monkeypatch.setattr(graphs._Pass, "replay", lambda *each: replay(*each) * 1.5)
    pack = _Trials(twin(base), True, 0.0)
    found = list(pack.steps())
    assert pack.told == [False] and len(captures) == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_what_a_pass_leaves_at_an_empty_place_is_not_compared(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it is whatever lay in the memory."""
    outer = grouped_experts._outer

    def with_noise(slope: torch.Tensor, x: torch.Tensor, ends: torch.Tensor, *more: Any) -> torch.Tensor:
        found = outer(slope, x, ends, *more)
        found[ends.diff(prepend=ends.new_zeros(1)) == 0] = 100 * torch.rand(())
        return found

    monkeypatch.setattr(grouped_experts, "_outer", with_noise)
    monkeypatch.setattr(f"{__name__}.PASSES", ((None, (30, 20)),) * 3)
    captures = replay_by_running_again(monkeypatch)
    pack = _Trials(twin(base), True, 0.0)
    list(pack.steps())
    assert len(captures) == 1 and pack.told == []
    assert pack._graphs is not None and all(each.is_right for each in pack._graphs._graphs.values())


def test_what_nobody_could_compare_teaches_no_trial(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trial is no number, in the last place, which what fills up a pass belongs to. The other one goes on to learn:
    from launched passes, until one is a number that replays can be compared with."""
    replay_by_running_again(monkeypatch)
    replay = graphs._Pass.replay

    def wrong(self: Any, *inputs: Any) -> Any:
        found = replay(self, *inputs)
        for each in self._gradients.of_pass:
            each.mul_(1.5)
        return found

    def spoilt(captured: bool) -> _Trials:
        pack = _Trials(twin(base), captured, 0.0)
        for weight in pack.trials[1].parameters():
            if weight.requires_grad:
                weight.data.fill_(torch.nan)
        return pack

    def numbers(pack: _Trials) -> list[list[torch.Tensor]]:
        return [[each for each in found if each.isfinite().all()] for found in pack.steps()]

    expected = numbers(spoilt(False))
    assert [len(found) > 0 for found in expected] == [lengths[0] is not None for lengths in PASSES]
    monkeypatch.setattr(graphs._Pass, "replay", wrong)
    torch.testing.assert_close(numbers(spoilt(True)), expected, rtol=1e-4, atol=1e-6)
