"""What transformers' loop is told."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from finetune_api.status import ExecutionPlan
from finetune_trainer.training.arguments import training_arguments
from support.trainer.adapted import adapted_spec


def test_a_process_trains_on_one_gpu_though_it_sees_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside a pod, on a machine with more GPUs than the job asks for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    model = SimpleNamespace(device=torch.device("cuda", 0), parameters=lambda: iter(()))
    plan = ExecutionPlan(micro_batch_size=2, gradient_accumulation_steps=1)
    try:
        arguments = training_arguments(adapted_spec(tmp_path), plan, tmp_path, model)
        assert (arguments.device, arguments.n_gpu) == (torch.device("cuda", 0), 1)
        assert arguments.train_batch_size == 2
    finally:  # accelerate keeps the device for all that follow
        AcceleratorState._reset_state(reset_partial_state=True)
