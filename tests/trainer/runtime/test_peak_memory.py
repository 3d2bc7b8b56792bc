"""The measured peak is training's, with a simulated allocator."""

import pytest
import torch

from finetune_trainer.runtime.peak_memory import peak, reset_peak, uncounted_memory


class Allocator:
    def __init__(self) -> None:
        self.held = self.most = 0

    def take(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)

    def reset(self) -> None:
        self.most = self.held


@pytest.mark.parametrize(("evaluation", "training", "expected"), [(900, 50, 150), (900, 200, 300), (10, 20, 150)])
def test_what_an_evaluation_takes_is_not_in_the_peak(
    evaluation: int, training: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = Allocator()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocator.most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocator.reset)
    reset_peak()
    allocator.take(100)
    allocator.take(50)
    allocator.take(-50)
    with uncounted_memory():
        allocator.take(evaluation)
        allocator.take(-evaluation)
    assert peak() == 150
    allocator.take(training)
    allocator.take(-training)
    assert peak() == expected
    reset_peak()
    assert peak() == 100
