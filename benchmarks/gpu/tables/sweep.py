"""A sweep of 16 trials in one process, with early stopping and without, beside the same trials as 16 jobs in turn."""

import random
from pathlib import Path
from typing import Any

from runs import DRY_RUN, DRY_STEPS, build, show, train, wanted
from tables.packed import RATES, ROWS, run_sweep

RANKS = (8, 16, 32, 64)
TRIALS = [{"training.learningRate": rate, "lora.rank": rank} for rate in RATES for rank in RANKS]
#: Steps of a trial.
STEPS = DRY_STEPS if DRY_RUN else 300
#: Steps between evaluations, and where trials are compared.
EVERY = STEPS // 10 or 1
RUNGS = [EVERY, 3 * EVERY]


def sweep(folder: Path) -> None:
    """Words after `sweep` pick of `jobs`, `trials` and `early stopping`; GPU-seconds are those of the processes."""
    build("mistral-7b")
    for name, count in (("train", 1200), ("eval", 32)):
        _write_learnable(folder / f"{name}.jsonl", count)
    evaluation = {"everySteps": EVERY, "keepBest": False}
    held_out = {"eval": f"file://{folder}/eval.jsonl"}
    if wanted("jobs"):
        show(_jobs(folder, evaluation, held_out))
    for name, stopping in (("trials", {}), ("early stopping", {"rungs": RUNGS, "reductionFactor": 4})):
        if wanted(name):
            more: dict[str, Any] = {"earlyStopping": stopping} if stopping else {}
            template = {"dataset": held_out, "evaluation": evaluation}
            found = run_sweep(
                folder, name, TRIALS, {"maxSteps": STEPS}, template, **more, objective={"metric": "evalLoss"}
            )
            show([found])


def _jobs(folder: Path, evaluation: dict[str, Any], held_out: dict[str, str]) -> list[dict[str, Any]]:
    """Two of the 16 jobs: one that finds nothing compiled, and one that finds in spec.cache what the first compiled."""
    settings = [
        f"training.batchSize={ROWS}",
        f"dataset.eval={held_out['eval']}",
        *(f"evaluation.{name}={str(value).lower()}" for name, value in evaluation.items()),
    ]
    found = []
    for name, trial in (("jobs, nothing compiled", TRIALS[0]), ("jobs, cache filled", TRIALS[-1])):
        values = [f"{path}={value}" for path, value in trial.items()]
        found.append(train(folder, name, [*settings, *values], STEPS, 4))
    return found


def _write_learnable(path: Path, count: int) -> None:
    """Write rows of few, unlike frequent words: a model of random weights learns how frequent each one is."""
    noise = random.Random(path.name)
    words = [f"t{number}" for number in range(4000, 4064)]
    with path.open("w") as file:
        for _ in range(40 if DRY_RUN else count):
            length = 24 if DRY_RUN else min(512, max(200, int(noise.gauss(325, 45))))
            drawn = noise.choices(words, [1 / (rank + 1) for rank in range(len(words))], k=length)
            file.write('{"text": "' + " ".join(drawn) + '"}\n')
