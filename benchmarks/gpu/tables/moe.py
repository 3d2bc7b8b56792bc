"""A mixture of experts, which is built first where it is missing."""

from pathlib import Path

from runs import FASTEST, build, limited, reference, show, train, wanted

#: The trainer with transformers' own experts, over weights that are dequantized once.
PLAIN_EXPERTS = """
from finetune_trainer.model import weights
weights.multiply_grouped = lambda model: None
from finetune_trainer.cli import cli
cli()
"""
ON_EXPERTS = ["lora.targetModules=[q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]", "lora.dropout=0"]
LOSSES = ["lora.dropout=0", "training.compile=disabled"]
#: By name: settings, steps, between log lines, the GiB that the trainer may believe the GPU to have, another script.
MOE: dict[str, tuple[list[str], int, int, int, str]] = {
    "whole GPU": ([], 60, 10, 0, ""),
    "24 GiB": ([], 60, 10, 24, ""),
    "12 GiB": ([], 60, 10, 12, ""),
    "nothing cached": (["quantization.cachedLayers=0"], 60, 10, 0, ""),
    "not compiled": (["training.compile=disabled"], 60, 10, 0, ""),
    "adapters on experts": (ON_EXPERTS, 60, 10, 0, ""),
    "losses": ([*LOSSES, "quantization.cachedLayers=0"], 100, 1, 0, ""),
    "losses of transformers' experts": ([*LOSSES, "quantization.cachedLayers=12"], 100, 1, 0, PLAIN_EXPERTS),
}


def moe(folder: Path) -> None:
    build("qwen3-moe")
    show(
        train(folder, name, settings, steps, log_every, script=script or limited(gib))
        for name, (settings, steps, log_every, gib, script) in MOE.items()
        if wanted(name)
    )
    if wanted("TRL"):
        for options in (FASTEST, FASTEST | {"gc": True, "prep": False}):
            reference(options)
