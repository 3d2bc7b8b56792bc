"""bitsandbytes' optimizers make the same updates by fewer launches and without waits."""

import copy
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.optim import AdamW, AdamW8bit, PagedAdamW8bit

from finetune_trainer.engine.optimizer import fuse_updates, unpaged


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(64, 96, generator=generator)) for _ in range(3)]


def _train(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter]) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for step in range(4):
        for index, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step + 10 * index))
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(("kind", "waits"), [(AdamW, 0), (AdamW8bit, 0), (PagedAdamW8bit, 16), (torch.optim.AdamW, 0)])
def test_it_waits_only_for_paged_state_and_changes_no_update(
    kind: type, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = _parameters(), _parameters()
    _train(kind(plain, lr=0.01), plain)
    counted: list[int] = []
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda tensor: counted.append(1))
    optimizer = kind(ours, lr=0.01)
    fuse_updates(optimizer)
    _train(optimizer, ours)
    assert isinstance(optimizer, kind)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert len(counted) == waits
    other = kind(_parameters(), lr=0.01)
    other.load_state_dict(optimizer.state_dict())


def _counting_updates(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of weights of each update from now on."""
    sizes: list[int] = []
    update = functional.optimizer_update_8bit_blockwise

    def counting(name: str, gradient: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        sizes.append(gradient.numel())
        update(name, gradient, *args, **kwargs)

    monkeypatch.setattr(functional, "optimizer_update_8bit_blockwise", counting)
    return sizes


def test_matrices_are_updated_at_once_but_those_that_would_share_a_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = []
    for treat in (lambda optimizer: None, fuse_updates):
        parameters = [*_parameters(), torch.nn.Parameter(torch.ones(64, 65)), torch.nn.Parameter(torch.ones(4))]
        optimizer = AdamW8bit(parameters, lr=0.01, weight_decay=0.1)
        treat(optimizer)
        with monkeypatch.context() as patch:
            sizes = _counting_updates(patch)
            _train(optimizer, parameters)
        updates.append((sizes, [parameter.detach() for parameter in parameters]))
    (plain, expected), (ours, found) = updates
    assert plain == [6144, 6144, 6144, 4160] * 4
    assert ours == [6144, 6144, 6144, 4160] + [3 * 6144, 4160] * 3
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_no_launch_has_more_weights_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.engine.optimizer._MOST_WEIGHTS", 2 * 6144)
    parameters = _parameters()
    optimizer = AdamW8bit(parameters, lr=0.01)
    fuse_updates(optimizer)
    sizes = _counting_updates(monkeypatch)
    _train(optimizer, parameters)
    assert sizes[3:] == [2 * 6144, 6144] * 3


@pytest.mark.parametrize("change", ["state is loaded", "weights are put elsewhere", "one has no gradient"])
def test_updates_stay_right_when(change: str) -> None:
    found = []
    for treat in (lambda optimizer: None, fuse_updates):
        parameters = _parameters()
        optimizer = AdamW8bit(parameters, lr=0.01)
        treat(optimizer)
        _train(optimizer, parameters)
        if change == "state is loaded":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif change == "weights are put elsewhere":
            parameters[1].data = parameters[1].data.clone()
        else:
            parameters[2].grad = None
            optimizer.step()
        _train(optimizer, parameters)
        found.append(parameters)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_small_state_is_not_paged() -> None:
    assert unpaged("paged_adamw_8bit", 13_631_488) == "adamw_8bit"
    assert unpaged("paged_adamw_8bit", 1 << 30) == "paged_adamw_8bit"
    assert unpaged("paged_adamw_32bit", 10) == "paged_adamw_32bit"
    assert unpaged("adamw_torch_fused", 10) == "adamw_torch_fused"
