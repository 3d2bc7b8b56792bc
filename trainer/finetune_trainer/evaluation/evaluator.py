"""Held-out loss and NLI metrics of a model, the same on any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from finetune_api.spec import FineTuneJobSpec, Generation
from finetune_trainer.data.batching import Collate
from finetune_trainer.data.dataset import Rows, TokenizedDataset
from finetune_trainer.data.encoding import Encoder
from finetune_trainer.data.rows import refuse_bad_rows
from finetune_trainer.evaluation import nli
from finetune_trainer.evaluation.generation import answers
from finetune_trainer.evaluation.lockstep import LockstepBatches
from finetune_trainer.runtime.distributed import all_gather
from finetune_trainer.runtime.precision import mixed_precision
from finetune_trainer.runtime.transfer import on_device
from finetune_trainer.settings import Ranks

_GENERATION_BATCH = 32


@dataclass(frozen=True)
class EvalPrompt:
    """A held-out row to answer: the prompt's token ids and the right label."""

    prompt: list[int]
    label: nli.Label


def eval_prompts(rows: Rows, encoder: Encoder, settings: Generation) -> list[EvalPrompt]:
    """The first settings.maxRows rows as questions. Raises DatasetInvalid for rows without an answer and label."""
    result, bad = [], []
    for row in rows[: settings.max_rows]:
        parts = nli.split_row(rows.format.to_example(row.data), settings.answer_marker)
        if isinstance(parts, str):
            bad.append(row.refuse(parts))
            continue
        prompt, answer = parts
        label = nli.read_answer(answer, settings.label_key).label
        if label is None:
            bad.append(row.refuse(f"the answer has no JSON object with {settings.label_key!r}"))
            continue
        ids = encoder.prompt(prompt) if isinstance(prompt, str) else encoder.chat_prompt(prompt)
        result.append(EvalPrompt(ids, label))
    refuse_bad_rows(bad)
    return result


class Evaluator:
    """Measures a model that answers with its loss (engine.loss) on the held-out rows, `collate.rows` at a time.
    `interrupted` is asked between batches and ends the work early.

    With `sharded` weights every process must call it, also where one alone is asked (`loss_of`).
    """

    def __init__(
        self,
        spec: FineTuneJobSpec,
        rows: TokenizedDataset,
        to_answer: Sequence[EvalPrompt],
        tokenizer: Any,
        ranks: Ranks,
        collate: Collate,
        interrupted: Callable[[], bool] = lambda: False,
        sharded: bool = False,
    ) -> None:
        self._spec = spec
        self._rows = rows
        self._questions = sorted(to_answer, key=lambda question: len(question.prompt))
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._sharded = sharded
        self._collate = collate
        self._batches = LockstepBatches(ranks, collate.rows, interrupted, sharded)
        self._generations = LockstepBatches(ranks, _GENERATION_BATCH, interrupted, sharded)

    def __call__(self, model: Any) -> dict[str, float]:
        """evalLoss (nats per token, the mean over all tokens), and the NLI metrics when asked for.

        Raises EvaluationAborted on every process alike.
        """
        with _evaluating(model, self._spec.training.precision):
            metrics = {"evalLoss": self._loss(model)}
            if self._questions:
                metrics |= self._nli(model)
        return metrics

    def loss_of(self, model: Any, rows: int = 8) -> float:
        """Mean loss per token over the first `rows` rows, on this process alone, never interrupted."""
        alone = LockstepBatches(Ranks(), self._batches.size)
        with _evaluating(model, self._spec.training.precision):
            sums = alone.run(range(len(self._rows.input_ids))[:rows], lambda batch: self._sum_of_batch(model, batch))
        return sum(loss for _, (loss, _) in sums) / sum(tokens for _, (_, tokens) in sums)

    def _loss(self, model: Any) -> float:
        lengths = self._rows.input_ids
        order = sorted(range(len(lengths)), key=lambda index: len(lengths[index]))
        sums = self._batches.run(order, lambda batch: self._sum_of_batch(model, batch))
        mine = [sum(loss for _, (loss, _) in sums), float(sum(tokens for _, (_, tokens) in sums))]
        total, count = _sum_over_processes(mine, model, self._ranks)
        return total / count

    def _sum_of_batch(self, model: Any, indices: Sequence[int]) -> tuple[float, int]:
        rows = [(self._rows.input_ids[index], self._rows.labels[index]) for index in indices]
        batch = on_device(self._collate(rows), model.device)
        return float(model(**batch)), len(batch["target_ids"])

    def _nli(self, model: Any) -> dict[str, float]:
        settings = self._spec.evaluation.generation

        def answer(batch: Sequence[EvalPrompt]) -> list[nli.Answer]:
            prompts = [question.prompt for question in batch]
            texts = answers(
                model,
                self._tokenizer,
                prompts,
                settings.max_new_tokens,
                in_step=self._sharded,
                interrupted=self._generations.interrupted,
            )
            return [nli.read_answer(text, settings.label_key) for text in texts]

        results = self._generations.run(self._questions, answer)
        labels = [question.label for batch, _ in results for question in batch]
        read = [each for _, answered in results for each in answered]
        shares = all_gather(self._ranks, (labels, read))
        return nli.score(
            [label for labels, _ in shares for label in labels], [answer for _, read in shares for answer in read]
        )


@contextmanager
def _evaluating(model: Any, precision: str) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), mixed_precision(model.device, precision):
            yield
    finally:
        model.train(was_training)


def _sum_over_processes(values: list[float], model: Any, ranks: Ranks) -> list[float]:
    if ranks.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=model.device)
    torch.distributed.all_reduce(tensor)
    return list(tensor.tolist())
