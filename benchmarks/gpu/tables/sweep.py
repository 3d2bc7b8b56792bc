"""A sweep of 16 trials in one process, with early stopping and without, beside the same trials as 16 jobs in turn."""

import random
import sys
from collections.abc import Iterator
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
SHORT = STEPS // 5 or 1
RUNGS = [EVERY, 3 * EVERY]


def sweep(folder: Path) -> None:
    """Words after `sweep` pick of `jobs`, `trials`, `early stopping`; GPU-seconds are those of the processes.

    `trials` takes a fifth of the steps and adds up the rest, in the open; `trials, full` takes them all.
    """
    build("mistral-7b")
    for name, count in (("train", 1200), ("eval", 32)):
        _write_learnable(folder / f"{name}.jsonl", count)
    evaluation = {"everySteps": EVERY, "keepBest": False}
    held_out = {"eval": f"file://{folder}/eval.jsonl"}
    show(_jobs(folder, evaluation, held_out))
    template = {"dataset": held_out, "evaluation": evaluation}
    aim = {"metric": "evalLoss"}
    for name, steps in (("trials, a fifth of the steps", SHORT), ("trials, full", STEPS)):
        if name in sys.argv[3:] or (steps == SHORT and wanted(name)):
            found = run_sweep(folder, name, TRIALS, {"maxSteps": steps}, template, objective=aim)
            show([found | {"formula": formula(found)} if steps == SHORT and not found["exit"] else found])
    if wanted("early stopping"):
        stopping = {"rungs": RUNGS, "reductionFactor": 4}
        training = {"maxSteps": STEPS}
        show([run_sweep(folder, "early stopping", TRIALS, training, template, earlyStopping=stopping, objective=aim)])


def formula(found: dict[str, Any]) -> str:
    """Return the seconds of all steps, and how they follow from `found`, the trials with SHORT steps.

    Trials that train together take their steps together: each group's pace counts once.
    """
    paces = [pace or 0.0 for pace in found["step_s"]]
    groups = [paces[begin] for begin in range(0, len(paces), found["at_once"])]
    evaluations = [seconds for each in found["evaluation_s"] for seconds in each[-SHORT // EVERY :]]
    each = sum(evaluations) / max(1, len(evaluations))
    steps, missing = STEPS - SHORT, len(paces) * (STEPS - SHORT) // EVERY
    total = found["seconds"] + steps * sum(groups) + missing * each
    told = " + ".join(f"{pace:.4f}" for pace in groups)
    return f"{found['seconds']:.1f} + {steps} steps * ({told}) + {missing} evaluations * {each:.2f} = {total:.0f} s"


def _jobs(folder: Path, evaluation: dict[str, Any], held_out: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Two of the 16 jobs: one that finds nothing compiled, and one that finds in spec.cache what the first compiled."""
    settings = [
        f"training.batchSize={ROWS}",
        f"dataset.eval={held_out['eval']}",
        *(f"evaluation.{name}={str(value).lower()}" for name, value in evaluation.items()),
    ]
    for name, trial in (("jobs, nothing compiled", TRIALS[0]), ("jobs, cache filled", TRIALS[-1])):
        values = [f"{path}={value}" for path, value in trial.items()]
        if wanted(name):
            yield train(folder, name, [*settings, *values], STEPS, 10)


def _write_learnable(path: Path, count: int) -> None:
    """Write rows of few, unlike frequent words: a model of random weights learns how frequent each one is."""
    noise = random.Random(path.name)
    words = [f"t{number}" for number in range(4000, 4064)]
    with path.open("w") as file:
        for _ in range(40 if DRY_RUN else count):
            length = 24 if DRY_RUN else min(512, max(200, int(noise.gauss(325, 45))))
            drawn = noise.choices(words, [1 / (rank + 1) for rank in range(len(words))], k=length)
            file.write('{"text": "' + " ".join(drawn) + '"}\n')
