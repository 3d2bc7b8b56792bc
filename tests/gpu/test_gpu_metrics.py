"""What the trainer's /metrics says of a real GPU. Skipped where there is none."""

import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_memory_and_utilization_of_every_gpu_are_scraped() -> None:
    from finetune_trainer.reporting import gpu

    registry = CollectorRegistry()
    assert gpu.register(registry)
    held = torch.ones(2**30, dtype=torch.bfloat16, device="cuda")  # 2 GiB
    square = held[: 2**26].view(2**13, 2**13)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        square = square @ square * 1e-4
        torch.cuda.synchronize()
    samples = [
        sample
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    ]
    memory = {s.labels["gpu"]: s.value for s in samples if s.name == "finetune_trainer_gpu_memory_used_bytes"}
    busy = {s.labels["gpu"]: s.value for s in samples if s.name == "finetune_trainer_gpu_utilization_ratio"}
    assert len(memory) == len(busy) == torch.cuda.device_count()
    assert max(memory.values()) >= held.nbytes
    assert 0 < max(busy.values()) <= 1
