"""Passes replayed as CUDA graphs. A CPU has none: here a replay runs again what was captured, on the same tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_trainer.data.batching import Collate, real_targets, real_tokens
from finetune_trainer.data.encoding import IGNORE
from finetune_trainer.engine import attention, graphs
from finetune_trainer.engine.lora import share_lora_inputs
from finetune_trainer.engine.model_loss import patch_fused_loss
from support.trainer import graph_steps
from support.trainer.captures import replay_by_running_again
from support.trainer.varlen import as_in_2_13

LONGEST = 100


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    return replay_by_running_again(monkeypatch)


@pytest.fixture
def model(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    attention.register()
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="varlen")
    base.config.use_cache = False
    adapter = LoraConfig(r=4, lora_dropout=0.0, init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter)
    patch_fused_loss(model.get_base_model())
    share_lora_inputs(model)
    return model.train()


def _rows(*lengths: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Rows of these lengths; about every other token is a target."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(4, 300, (length,), generator=generator).tolist()
        learned = torch.randint(0, 2, (length,), generator=generator).tolist()
        found.append((ids, [token if learn else IGNORE for token, learn in zip(ids, learned, strict=True)]))
    return found


def _batch(*lengths: int, few_shapes: bool = True, seed: int = 0) -> dict[str, Any]:
    collate = Collate(True, 0, rows=4, longest=LONGEST, few_shapes=few_shapes)
    return collate(_rows(*lengths, seed=seed))


def _loss(model: Any) -> graphs.Loss:
    return lambda batch, targets: model(**batch) / targets.clamp(min=1)


def _gradient(model: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in _trained(model) if p.grad is not None])


def _trained(model: Any) -> list[torch.nn.Parameter]:
    return [each for each in model.parameters() if each.requires_grad]


@pytest.mark.parametrize("lengths", [(20, 31), (64,), (1, 1), (63, 1), (65, 9, 100, 77), (2, 3, 1, 2), ()])
@pytest.mark.parametrize("own", [False, True])
def test_a_filled_up_pass_has_the_loss_and_the_gradient_of_the_bare_one(
    lengths: tuple[int, ...], own: bool, model: Any
) -> None:
    model.get_base_model().fused_loss.own = own
    found = []
    for few_shapes in (False, True):
        batch = _batch(*lengths, few_shapes=few_shapes)
        assert (real_tokens(batch), real_targets(batch)) == (sum(lengths) or 2, len(_targets(*lengths)))
        model.zero_grad()
        loss = model(**batch)
        loss.backward()
        found.append((loss.detach(), _gradient(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-6)


def _targets(*lengths: int) -> list[int]:
    return [label for _, labels in _rows(*lengths) for label in labels[1:] if label != IGNORE]


def test_many_lengths_have_few_shapes() -> None:
    batches = [_batch(20 + extra, 31, LONGEST) for extra in range(60)]
    assert {batch["input_ids"].shape[1] for batch in batches} == {192, 256}
    assert {(batch["max_length_q"], len(batch["cu_seq_lens_q"])) for batch in batches} == {(LONGEST, 6)}
    assert all(int(batch["cu_seq_lens_q"][-1]) == batch["input_ids"].shape[1] for batch in batches)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_replayed_steps_leave_the_numbers_of_plain_ones_bit_for_bit(
    accumulated: int, model: Any, captured: list[Any]
) -> None:
    """Also where shapes alternate, and a micro-batch of a step runs as ever because its shape is new."""
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    lengths = [(20, 31), (70, 60, 20), (40, 20), (90, 90, 9), (33,), (80, 50)] * 3
    found = []
    for uses_graphs in (False, True):
        with torch.no_grad():
            for name, each in model.named_parameters():
                each.copy_(start[name])
        steps = graphs.StepGraphs(_trained(model), _loss(model))
        optimizer = torch.optim.SGD(_trained(model), lr=0.1)
        history = []
        for first in range(0, len(lengths), accumulated):
            targets = torch.tensor(50)
            for number in range(first, first + accumulated):
                batch = _batch(*lengths[number], seed=number)
                loss = steps.run(batch, targets) if uses_graphs else None
                if loss is None:
                    loss = _loss(model)(batch, targets)
                    loss.backward()
                history.append(loss.detach().clone())
            history.append(_gradient(model))
            optimizer.step()
            optimizer.zero_grad()
        found.append(history)
    assert len(captured) >= 2
    assert captured[0] is None and set(captured[1:]) == {"pool"}, "all graphs share the memory of the first"
    assert all(torch.equal(ours, plain) for plain, ours in zip(*found, strict=True))


def test_a_training_with_graphs_has_the_numbers_of_one_without(
    captured: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dropout, 4 bits, 8-bit optimizer state that moves the weights, an evaluation, a resume; as tests/gpu has it."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", as_in_2_13)
    model = graph_steps.small_model(tmp_path, "cpu", compiled=False)
    launched, replayed = (graph_steps.train(model, replayed=replayed, steps=10) for replayed in (False, True))
    assert replayed.problem is None
    assert replayed.replayed >= 6, "of 20: weights move twice, and shapes are seen first"
    assert replayed.equals(launched)
    printed = capsys.readouterr()
    assert "CUDA graphs: the first replayed pass is the launched one exactly" in printed.out + printed.err


@pytest.mark.parametrize("wrong", ["stale rows", "gradient", "no number", "loss", "no random numbers"])
def test_the_first_replay_is_compared_with_the_launched_pass(
    wrong: str, model: Any, captured: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A graph that computes something else is given up before anything is learned from it."""
    replay = graphs._Pass.replay

    def other(self: Any, batch: Any, targets: torch.Tensor) -> torch.Tensor:
        before = torch.get_rng_state()
        if wrong == "stale rows":
            batch = dict(batch, input_ids=batch["input_ids"].flip(1))
        found = replay(self, batch, targets)
        if wrong == "stale rows":
            self._fill(dict(batch, input_ids=batch["input_ids"].flip(1)), targets)
        if wrong == "gradient":
            self._gradients.of_pass[0].mul_(2)
        if wrong == "no number":
            self._gradients.of_pass[-1].fill_(float("nan"))
        if wrong == "no random numbers":
            torch.set_rng_state(before)
        return found * 1.1 if wrong == "loss" else found

    def drawing(batch: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        torch.rand(())
        return _loss(model)(batch, targets)

    monkeypatch.setattr(graphs._Pass, "replay", other)
    steps, batch, targets = graphs.StepGraphs(_trained(model), drawing), _batch(20, 31), torch.tensor(50)
    assert steps.run(batch, targets) is None
    before = torch.get_rng_state()
    assert [steps.run(batch, targets) for _ in range(2)] == [None, None]
    assert len(captured) == 1
    assert torch.equal(torch.get_rng_state(), before), "the pass that is launched instead draws the same"
    assert all(each.grad is None for each in _trained(model))
    printed = capsys.readouterr()
    told = "draw the random numbers" if wrong == "no random numbers" else "differs from the launched one: loss"
    assert steps.problem is not None and told in steps.problem
    assert f"CUDA graphs disabled, launching each kernel (slower): {steps.problem}" in printed.out + printed.err


def test_every_shape_is_compared_not_the_first_alone(
    model: Any, captured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, targets = graphs._Pass.replay, torch.tensor(50)

    def wrong_when_long(self: Any, batch: Any, targets: torch.Tensor) -> torch.Tensor:
        found = replay(self, batch, targets)
        return found * 1.1 if batch["input_ids"].shape[1] > 100 else found

    monkeypatch.setattr(graphs._Pass, "replay", wrong_when_long)
    steps = graphs.StepGraphs(_trained(model), _loss(model))
    short, long = _batch(20, 31), _batch(90, 90)
    assert [steps.run(short, targets) is None for _ in range(3)] == [True, False, False]
    assert [steps.run(long, targets) is None for _ in range(2)] == [True, True]
    assert steps.problem is not None and "loss 10.0%" in steps.problem


def test_a_pass_without_targets_proves_nothing(
    model: Any, captured: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    steps, targets = graphs.StepGraphs(_trained(model), _loss(model)), torch.tensor(50)
    for lengths in ((), (), ()):
        steps.run(_batch(*lengths), targets)
    assert "first replayed pass" not in capsys.readouterr().out
    for _ in range(2):
        steps.run(_batch(20, 31), targets)
    assert "first replayed pass is the launched one exactly" in capsys.readouterr().out


def test_a_pass_that_is_no_number_is_left_to_the_caller_and_to_training_to_tell(
    model: Any, captured: list[Any]
) -> None:
    factor = torch.tensor(float("nan"))
    steps = graphs.StepGraphs(_trained(model), lambda batch, targets: _loss(model)(batch, targets) * factor)
    batch, targets = _batch(20, 31), torch.tensor(50)
    assert [steps.run(batch, targets) for _ in range(3)] == [None] * 3
    assert steps.problem is None and all(each.grad is None for each in _trained(model))
    factor.fill_(1.0)
    assert steps.run(batch, targets) is not None and len(captured) == 1


def test_gradients_of_an_adapter_that_only_some_passes_use_are_added(model: Any, captured: list[Any]) -> None:
    """The second shape of a step uses what the first has not: what the first has found stays."""
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

    def loss(batch: dict[str, Any], targets: torch.Tensor) -> torch.Tensor:
        both = first if len(batch["x"]) == 3 else second
        return (both * batch["x"][:3]).sum()

    steps = graphs.StepGraphs([first, second], loss)
    batches = [{"x": torch.arange(3.0)}, {"x": torch.arange(4.0)}, {"x": torch.arange(3.0) + 1}]
    for _ in range(2):
        for batch in batches[:2]:
            steps.run(batch, torch.tensor(1))
    first.grad = second.grad = None
    for batch in (batches[0], batches[2], batches[1]):
        assert steps.run(batch, torch.tensor(1)) is not None
    assert torch.equal(first.grad, batches[0]["x"] + batches[2]["x"])
    assert torch.equal(second.grad, torch.arange(3.0))


def test_weights_that_moved_are_captured_again(model: Any, captured: list[Any]) -> None:
    steps = graphs.StepGraphs(_trained(model), _loss(model))
    batch, targets = _batch(20, 31), torch.tensor(50)
    first = [steps.run(batch, targets) is None for _ in range(3)]
    moved = _trained(model)[0]
    moved.data = moved.data.clone() * 2
    model.zero_grad()
    second = [steps.run(batch, targets) is None for _ in range(2)]
    assert (first, second, len(captured)) == ([True, False, False], [True, False], 2)
    loss = steps.run(batch, targets)
    assert loss is not None
    assert torch.equal(loss, _loss(model)(batch, targets))


def test_what_cannot_be_captured_runs_as_ever_and_the_log_says_why(
    model: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*args: Any) -> Any:
        torch.rand(())
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "capture", refused)
    steps, before = graphs.StepGraphs(_trained(model), _loss(model)), torch.get_rng_state()
    assert [steps.run(_batch(20, 31), torch.tensor(50)) for _ in range(4)] == [None] * 4
    assert steps.problem is not None and "operation not permitted" in steps.problem
    assert torch.equal(torch.get_rng_state(), before)
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count("CUDA graphs disabled, launching each kernel (slower): RuntimeError") == 1


def test_adapters_that_a_pass_does_not_use_keep_no_gradient(model: Any, captured: list[Any]) -> None:
    unused = torch.nn.Parameter(torch.ones(3))
    steps = graphs.StepGraphs([*_trained(model), unused], _loss(model))
    for _ in range(3):
        steps.run(_batch(20, 31), torch.tensor(50))
    assert unused.grad is None
    assert captured == [None]
