"""What a job takes besides its steps, stage by stage: the start, and the recipe's whole job."""

import shutil
import sys
from pathlib import Path
from typing import Any

from runs import DRY_RUN, DRY_STEPS, show, train, write_rows

#: The recipe's whole job: 10,000 rows of 325 tokens, three epochs of 16 rows a step, NLI metrics every 250 steps.
ROWS, EPOCHS, BATCH, EVERY = 10_000, 3, 16, 250
STEPS = ROWS * EPOCHS // BATCH
#: One after every 250 steps and one after the last; the base model's is in the start.
EVALUATIONS = -(-STEPS // EVERY)
NLI = [
    "evaluation.metrics=[loss,nli]",
    "evaluation.generation.maxNewTokens=256",
    "evaluation.generation.answerMarker=t99",
]
#: The steps of the short form; it evaluates after half of them and at the end.
SHORT = DRY_STEPS if DRY_RUN else 60


def start(folder: Path) -> None:
    """The first step of a job on a machine that has compiled nothing, and of the next one."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    results = (train(folder, f"start, {name}", [], 10, 2) for name in ("nothing compiled", "compiled before"))
    show({key: each[key] for key in ("setting", "start", "exit", "why") if key in each} for each in results)


def whole_job(folder: Path) -> None:
    """From the start of the process to its end, on a machine that has compiled nothing, and then with a filled cache.

    `whole-job full` does all of it. The short form measures each stage once and adds up, in the open: the seconds of a
    short run, and those of the steps and evaluations that it lacks.
    """
    full = "full" in sys.argv[3:]
    shutil.rmtree(folder / "cache", ignore_errors=True)
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "eval.jsonl", 200, 400, answer=' t99 {"predicted_label": 1}')
    steps, every = (STEPS, EVERY) if full else (SHORT, SHORT // 2)
    settings = [f"dataset.eval=file://{folder}/eval.jsonl", f"evaluation.everySteps={every}", *NLI]
    for name in ("nothing compiled", "cache filled"):
        result = train(folder, f"whole job, {name}", settings, steps, 10)
        if full or "why" in result:
            show([result])
        else:
            # The second job's evaluation of the base model is the first one's.
            later = result["evaluation_seconds"][-2:]
            show([result | {"formula": formula(result["wall_s"], steps, result["step_s"], later)}])


def formula(wall: float, steps: int, step: float, evaluations: list[Any]) -> str:
    """Return the whole job's seconds, and how they follow from a run of so many `steps` with these `evaluations`."""
    each = sum(evaluations) / len(evaluations)
    missing = EVALUATIONS - len(evaluations)
    total = wall + (STEPS - steps) * step + missing * each
    return f"{wall:.1f} + {STEPS - steps} steps * {step:.4f} + {missing} evaluations * {each:.2f} = {total:.0f} s"
