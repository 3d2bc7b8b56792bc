"""Measure the trainer on one GPU, and on two, beside TRL's own loop, and its memory prediction beside the peak.

    python benchmarks/gpu/reference.py build /tmp/mistral7b     # random weights of Mistral-7B-v0.3's shape, 14.5 GB
    python benchmarks/gpu/reference.py build /tmp/llama3 llama-3-8b    # another shape
    python benchmarks/gpu/trainer.py /tmp/mistral7b engine      # what the trainer chooses for GPUs of several sizes
    python benchmarks/gpu/trainer.py /tmp/mistral7b losses      # 100 steps of the fast path beside the plain one
    python benchmarks/gpu/trainer.py /tmp/mistral7b fp8         # training.precision: fp8 beside bf16
    python benchmarks/gpu/trainer.py /tmp/mistral7b peers       # beside TRL and Unsloth, each at its fastest
    python benchmarks/gpu/trainer.py /tmp/mistral7b long        # the same with rows of up to 2,048 tokens
    python benchmarks/gpu/trainer.py /tmp/mistral7b speed       # the recipe, and TRL's best setting, each beside TRL
    python benchmarks/gpu/trainer.py /tmp/mistral7b memory      # predicted and measured peak of many settings
    python benchmarks/gpu/trainer.py /tmp/qwen3-moe moe         # a mixture of experts, built first where it is missing
    python benchmarks/gpu/trainer.py /tmp/mistral7b answers     # an evaluation with 200 answers of 256 tokens
    python benchmarks/gpu/trainer.py /tmp/mistral7b small       # few rows a step, kernels launched and as CUDA graphs
    python benchmarks/gpu/trainer.py /tmp/qwen-0.5b small qwen2.5-0.5b    # the same of small models, built first
    python benchmarks/gpu/trainer.py /tmp/mistral7b start       # from the process's start to the first step
    python benchmarks/gpu/trainer.py /tmp/mistral7b whole-job   # the recipe's job, extrapolated; `whole-job full`: all
    python benchmarks/gpu/trainer.py /tmp/llama3.1 long-rows    # rows of up to 32,768 tokens on a card of 80 GiB
    python benchmarks/gpu/trainer.py /tmp/llama3.1 all-linear   # 8B, every linear layer, rows of up to 4,096 tokens
    python benchmarks/gpu/trainer.py /tmp/llama70b 70b          # Llama-3-70B's shape on a card of 80 GiB: 40 GB
    python benchmarks/gpu/trainer.py /tmp/mistral7b packed      # trials that share a process, beside jobs
    python benchmarks/gpu/trainer.py /tmp/mistral7b sweep       # 16 trials in a process, beside 16 jobs in turn
    python benchmarks/gpu/trainer.py /tmp/mistral7b two-gpus    # two GPUs beside one, with whole and shared-out weights

Speed is in real tokens per second after warm-up; compare figures of one run only. Each line printed is `RESULT {json}`.
Words after the table's name pick settings whose name begins with one of them: `engine whole 24`.
Unsloth wants an older TRL than ours: install it in an environment of its own, and name its interpreter in
UNSLOTH_PYTHON; without, `peers` and `long` pass over it.

DRY_RUN=1 tries a command out where there is no GPU: a tiny model, built first where it is missing, and six steps of
short rows on the CPU, without TRL and Unsloth. Its figures mean nothing: it shows that the settings are still valid.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from runs import DRY_RUN, build, write_rows
from tables import answers, engine, large, memory, moe, packed, small, sweep, whole_run

#: By name, what measures a table; it gets a folder with training rows.
TABLES: Final[dict[str, Callable[[Path], None]]] = {
    "70b": large.seventy,
    "all-linear": large.all_linear,
    "answers": answers.answers,
    "engine": engine.engine,
    "fp8": engine.fp8,
    "long": engine.long,
    "long-rows": large.long_rows,
    "losses": engine.losses,
    "memory": memory.memory,
    "moe": moe.moe,
    "packed": packed.packed,
    "peers": engine.peers,
    "small": small.small,
    "speed": engine.speed,
    "sweep": sweep.sweep,
    "start": whole_run.start,
    "two-gpus": engine.two_gpus,
    "whole-job": whole_run.whole_job,
}


def main() -> None:
    """Run one of the tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if DRY_RUN:
            build("qwen3-moe" if sys.argv[2] == "moe" else "mistral-7b")
        write_rows(folder / "train.jsonl")
        TABLES[sys.argv[2]](folder)


if __name__ == "__main__":
    main()
