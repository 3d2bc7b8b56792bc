"""The predicted time of a step, held against what was measured (docs/performance.md)."""

from typing import Any

import pytest

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.planning import planner, speed
from finetune_trainer.planning.device import Device
from finetune_trainer.planning.memory import GIB
from finetune_trainer.planning.model_shape import ModelShape

MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
}


def tokens_per_second(gpu: str, memory_gib: int, batch: int = 16, length: int = 325, **training: Any) -> float:
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"source": "hf://a/b"},
            "dataset": {"train": "s3://data/x.jsonl"},
            "output": {"uri": "s3://adapters/x"},
            "training": {"batchSize": batch, "maxLength": length, **training},
        },
        by_alias=True,
        by_name=False,
    )
    shape = ModelShape.from_config(MISTRAL)
    assert shape is not None
    plan = planner.make_plan(spec, Device("cuda", memory_bytes=memory_gib * GIB), 1, "auto", shape)
    return batch * length / speed.step_seconds(plan, shape, spec, gpu)


@pytest.mark.parametrize(("memory", "measured"), [(141, 19_464), (24, 18_237), (8, 11_026)])
def test_the_prediction_is_near_what_was_measured(memory: int, measured: float) -> None:
    assert tokens_per_second("H200", memory) == pytest.approx(measured, rel=0.15)


def test_small_batches_are_as_slow_as_they_were_measured() -> None:
    settings = {"cudaGraphs": "disabled"}
    whole = tokens_per_second("H200", 141, **settings)
    shares = [tokens_per_second("H200", 141, batch, **settings) / whole for batch in (1, 2, 4, 8)]
    assert shares == pytest.approx([0.13, 0.27, 0.53, 0.94], rel=0.3)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("H100", "H100"),
        ("h200", "H200"),
        ("NVIDIA-H100-80GB-HBM3", "H100"),
        ("NVIDIA-H100-PCIe", "H100 PCIE"),
        ("NVIDIA-H100-NVL", "H100 NVL"),
        ("NVIDIA-A100-SXM4-80GB-MIG-1g.10gb", "A100"),
        ("NVIDIA-A10G", "A10G"),
        ("NVIDIA-GeForce-RTX-4090", "RTX 4090"),
        ("NVIDIA-L40S", "L40S"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("Tesla-T4", None),
        ("", None),
    ],
)
def test_gpus_are_known_by_their_names_and_their_nodes_labels(name: str, known: str | None) -> None:
    assert speed.known_gpu(name) == known
