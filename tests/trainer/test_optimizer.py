"""bitsandbytes' optimizers without waits make the same updates."""

import pytest
import torch
from bitsandbytes.optim import AdamW, AdamW8bit, PagedAdamW8bit

from finetune_trainer.engine.optimizer import do_not_wait, unpaged


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
    do_not_wait(optimizer)
    _train(optimizer, ours)
    assert isinstance(optimizer, kind)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
    assert len(counted) == waits
    other = kind(_parameters(), lr=0.01)
    other.load_state_dict(optimizer.state_dict())


def test_a_small_state_is_not_paged() -> None:
    assert unpaged("paged_adamw_8bit", 13_631_488) == "adamw_8bit"
    assert unpaged("paged_adamw_8bit", 1 << 30) == "paged_adamw_8bit"
    assert unpaged("paged_adamw_32bit", 10) == "paged_adamw_32bit"
    assert unpaged("adamw_torch_fused", 10) == "adamw_torch_fused"
