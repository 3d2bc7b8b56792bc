"""Speed: what the trainer chooses for GPUs of several sizes, beside TRL and Unsloth, in FP8, and on two GPUs."""

import os
from pathlib import Path

from runs import FASTEST, PLAIN, RECIPE, limited, reference, show, train, wanted, write_rows

#: GiB the trainer may believe the GPU to have; 0: what it has. The engine's choices do the rest.
ENGINE = (0, 80, 40, 24, 8)
SPEED = {
    "recipe": (RECIPE, {}),
    "batch 16, no checkpointing": (
        [*PLAIN, "training.microBatchSize=16", "training.gradientCheckpointing=disabled"],
        FASTEST,
    ),
}
#: By length of rows; those of 2,048 tokens would take TRL more memory than there is.
TRL = {512: FASTEST, 2048: FASTEST | {"gc": True}}
UNSLOTH = (FASTEST, FASTEST | {"dropout": 0})
TWO_GPUS = ["training.batchSize=32", "training.microBatchSize=16"]
#: The trainer, made to believe that no GPU can hold a whole copy of the weights.
SHARDED = """
from finetune_trainer.planning import layout_search
fitting = layout_search.LayoutSearch._fitting
layout_search.LayoutSearch._fitting = lambda case, shape, sharded: fitting(case, shape, sharded) if sharded else []
from finetune_trainer.cli import cli
cli()
"""


def speed(folder: Path) -> None:
    for setting, (ours, theirs) in SPEED.items():
        reference(theirs)
        show([train(folder, setting, ours, 16, 4)])


def engine(folder: Path) -> None:
    reference({})
    write_rows(folder / "eval.jsonl", 32)
    evaluated = [f"dataset.eval=file://{folder}/eval.jsonl", "evaluation.everySteps=20"]
    names = {f"{gib} GiB" if gib else "whole GPU": gib for gib in ENGINE}
    show(train(folder, name, evaluated, 60, 10, script=limited(gib)) for name, gib in names.items() if wanted(name))


def peers(folder: Path, longest: int = 512) -> None:
    write_rows(folder / "train.jsonl", longest=longest)
    show([train(folder, f"{longest} tokens", [f"training.maxLength={longest}"], 40, 5)])
    reference({"maxlen": longest} | TRL[longest])
    if python := os.environ.get("UNSLOTH_PYTHON"):
        for options in UNSLOTH:
            reference({"maxlen": longest} | options, "unsloth", python)


def long(folder: Path) -> None:
    peers(folder, 2048)


def fp8(folder: Path) -> None:
    reference({})
    show(train(folder, name, [f"training.precision={name}"], 60, 10) for name in ("bf16", "fp8"))


def losses(folder: Path) -> None:
    paths: tuple[tuple[str, list[str]], ...] = (("plain", PLAIN), ("engine", []))
    show(train(folder, name, [*settings, "lora.dropout=0"], 100, 1) for name, settings in paths)


def two_gpus(folder: Path) -> None:
    runs = (("one GPU", 1, ""), ("two GPUs", 2, ""), ("two GPUs, weights shared out", 2, SHARDED))
    results = [train(folder, setting, TWO_GPUS, 16, 4, gpus, script) for setting, gpus, script in runs]
    for result in results:
        result["times_one_gpu"] = round(result.get("tok_s", 0) / results[0].get("tok_s", 1), 2)
    show(results)
