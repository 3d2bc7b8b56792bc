"""An evaluation with 200 answers of 256 tokens, and the same by transformers' own `generate`."""

from pathlib import Path

from runs import DRY_RUN, DRY_STEPS, limited, show, train, wanted, write_rows

#: The trainer with answers from transformers' own `generate`.
GENERATE = """
from finetune_trainer.evaluation import generation
init = generation.AnswerGenerator.__init__
def plainly(self, *args, **options):
    init(self, *args, **options)
    self._plain = True
generation.AnswerGenerator.__init__ = plainly
from finetune_trainer.cli import cli
cli()
"""
ANSWERS = [
    "evaluation.metrics=[loss,nli]",
    f"evaluation.everySteps={DRY_STEPS // 2 if DRY_RUN else 5}",
    "training.compile=disabled",
    "evaluation.generation.maxNewTokens=256",
    "evaluation.generation.answerMarker=t99",
]


def answers(folder: Path) -> None:
    write_rows(folder / "eval.jsonl", 200, 400, answer=' t99 {"predicted_label": 1}')
    settings = [f"dataset.eval=file://{folder}/eval.jsonl", *ANSWERS]
    scripts = {"decode": "", "decode, 24 GiB": limited(24), "generate": GENERATE}
    show(train(folder, name, settings, 10, 5, script=script) for name, script in scripts.items() if wanted(name))
