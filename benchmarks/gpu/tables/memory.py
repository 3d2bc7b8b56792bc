"""Predicted and measured peak of many settings."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runs import PLAIN, RECIPE, show, train, wanted

MEMORY = {
    "micro-batch 4, checkpointing": RECIPE,
    "micro-batch 16, checkpointing": [*PLAIN, "training.microBatchSize=16", "training.gradientCheckpointing=enabled"],
    "micro-batch 1": [*PLAIN, "training.microBatchSize=1", "training.gradientCheckpointing=disabled"],
    "micro-batch 4": [*PLAIN, "training.microBatchSize=4", "training.gradientCheckpointing=disabled"],
    "micro-batch 8": [*PLAIN, "training.microBatchSize=8", "training.gradientCheckpointing=disabled"],
    "packed, all cached": ["training.microBatchSize=16"],
    "packed, half cached, a quarter recomputed": [
        "training.microBatchSize=8",
        "quantization.cachedLayers=16",
        "training.gradientCheckpointing=8",
    ],
    "packed, nothing cached, checkpointing": [
        "training.microBatchSize=16",
        "quantization.cachedLayers=0",
        "training.gradientCheckpointing=enabled",
    ],
    "packed, selective": ["training.microBatchSize=16", "training.gradientCheckpointing=selective"],
    "packed, every layer": ["training.microBatchSize=8", "lora.targetModules=[all-linear]"],
    "packed, no dropout": ["training.microBatchSize=8", "lora.dropout=0"],
    "packed, not compiled": ["training.microBatchSize=8", "training.compile=disabled"],
    "micro-batch 8, 256 tokens": [
        *PLAIN,
        "training.microBatchSize=8",
        "training.maxLength=256",
        "training.gradientCheckpointing=disabled",
    ],
    "batch 32, checkpointing": [
        *PLAIN,
        "training.batchSize=32",
        "training.microBatchSize=32",
        "training.gradientCheckpointing=enabled",
    ],
    "16 bits, checkpointing": ["quantization.bits=16", *RECIPE],
    "8 bits, checkpointing": ["quantization.bits=8", *RECIPE],
    "single quantization": ["quantization.doubleQuant=false", *RECIPE],
    "rank 64, all linear, checkpointing": ["lora.rank=64", "lora.targetModules=[all-linear]", *RECIPE],
    "all linear, micro-batch 2": [
        *PLAIN,
        "lora.targetModules=[all-linear]",
        "training.microBatchSize=2",
        "training.gradientCheckpointing=disabled",
    ],
    "fp32 step, checkpointing": ["training.precision=fp32", *RECIPE],
    "torch AdamW, checkpointing": ["training.optimizer=adamw_torch_fused", *RECIPE],
}


def memory(folder: Path) -> None:
    settings = [item for item in MEMORY.items() if wanted(item[0])]
    with ThreadPoolExecutor(int(os.environ.get("PARALLEL", "1"))) as pool:
        show(pool.map(lambda item: train(folder, item[0], item[1], 3, 1), settings))
