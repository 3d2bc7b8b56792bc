"""Held-out loss and NLI metrics of a model, the same on any number of ranks."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import structlog
import torch
from torch.nn.functional import cross_entropy

from finetune_api.spec import FineTuneJobSpec
from finetune_api.spec_evaluation import Evaluation
from finetune_api.status import ExecutionPlan
from finetune_trainer.data.dataset import TokenizedDataset
from finetune_trainer.data.encoding import IGNORE, Encoder
from finetune_trainer.data.jinja import TemplateError
from finetune_trainer.data.row_files import Rows
from finetune_trainer.data.rows import refuse_bad_rows
from finetune_trainer.evaluation import nli
from finetune_trainer.evaluation.answers import MAX_ROWS, AnsweredRow
from finetune_trainer.evaluation.fused_modules import fused
from finetune_trainer.evaluation.generation import AnswerGenerator
from finetune_trainer.evaluation.lockstep import LockstepBatches, never
from finetune_trainer.methods import Method
from finetune_trainer.runtime.distributed import all_gather
from finetune_trainer.runtime.peak_memory import uncounted_memory
from finetune_trainer.runtime.precision import mixed_precision
from finetune_trainer.runtime.transfer import on_device
from finetune_trainer.settings import Ranks

log = structlog.get_logger(__name__)
#: Rows that show whether an adapter loaded back computes the same.
_SAMPLE: Final = 8


@dataclass(frozen=True)
class EvalPrompt:
    """A held-out row to answer.

    Attributes:
        prompt: Token ids.
        label: The right label.
        row: Its number among the held-out rows.
        answer: The right answer.
    """

    prompt: list[int]
    label: nli.Label
    row: int
    answer: str


def eval_prompts(rows: Rows | None, encoder: Encoder, evaluation: Evaluation) -> list[EvalPrompt]:
    """Return the first generation.maxRows rows as prompts; none when the spec asks for no generated answers.

    Raises:
        DatasetInvalid: When a row has no answer, no label in it, or nothing before it; with file and line.
    """
    if rows is None or "nli" not in evaluation.metrics:
        return []
    result, bad, settings = [], [], evaluation.generation
    for number, row in enumerate(rows[: settings.max_rows]):
        parts = nli.split_row(rows.format.to_example(row.data), settings.answer_marker)
        if isinstance(parts, str):
            bad.append(row.refuse(parts))
            continue
        prompt, answer = parts
        label = nli.read_answer(answer, settings.label_key).label
        if label is None:
            bad.append(row.refuse(f"the answer has no JSON object with {settings.label_key!r}"))
            continue
        try:
            ids = encoder.prompt(prompt) if isinstance(prompt, str) else encoder.chat_prompt(prompt)
        except TemplateError as error:
            bad.append(row.refuse(str(error)))
            continue
        if not ids:
            bad.append(row.refuse("its prompt has no token, and the model answers by continuing one"))
            continue
        result.append(EvalPrompt(ids, label, number, answer))
    refuse_bad_rows(bad)
    return result


class Evaluator:
    """Measures a model on held-out rows: the mean loss, and with prompts the NLI metrics of its answers.

    With sharded weights every rank must call it, also `loss_of`.

    Attributes:
        answers: The first held-out rows as the last evaluation answered them; none without NLI metrics.
    """

    def __init__(
        self,
        spec: FineTuneJobSpec,
        method: Method,
        plan: ExecutionPlan,
        tokenizer: Any,
        ranks: Ranks,
        rows: TokenizedDataset,
        prompts: Sequence[EvalPrompt] = (),
        interrupted: Callable[[], bool] = never,
    ) -> None:
        """Prepare to measure `rows`.

        Args:
            spec: Says in which precision to compute and how to generate.
            method: The training method, whose loss is measured.
            plan: The execution plan: packing, rows per batch, sharding.
            tokenizer: For padding, and to read answers.
            ranks: This process among the others; the rows are partitioned over all.
            rows: The held-out rows.
            prompts: The rows to answer; none without NLI metrics.
            interrupted: Asked between batches; the evaluation is aborted when this process, or another, must stop.
        """
        self._spec = spec
        self._method = method
        self._tokenizer = tokenizer
        self._ranks = ranks
        self._rows = rows
        self._prompts = sorted(prompts, key=lambda each: len(each.prompt))
        self.answers: list[AnsweredRow] = []
        size, self._sharded = plan.micro_batch_size or 1, bool(plan.sharded)
        self._collate = method.collator(plan, tokenizer.pad_token_id, size)
        self._batches = LockstepBatches(ranks, size, interrupted, self._sharded)
        self._generations = LockstepBatches(ranks, max(1, len(prompts)), interrupted, self._sharded)
        self._generate = AnswerGenerator(
            tokenizer,
            spec.evaluation.generation.max_new_tokens,
            lockstep=self._sharded,
            interrupted=self._generations.interrupted,
            packed=bool(plan.packing),
        )

    def evaluate(self, model: Any) -> dict[str, float]:
        """Measure `model` on all rows.

        Returns:
            evalLoss (nats per target, the mean over all targets), and the metrics of nli.score when there are prompts.

        Raises:
            EvaluationAborted: On every rank alike, when one was asked to stop.
        """
        with self._evaluating(model):
            began = time.monotonic()
            metrics = {"evalLoss": self._mean_loss(model)}
            log.info(f"Evaluated {len(self._rows.input_ids)} rows in {time.monotonic() - began:.1f} s")
            if self._prompts:
                began = time.monotonic()
                with uncounted_memory():
                    metrics |= self._nli_metrics(model)
                log.info(f"Answered {len(self._prompts)} prompts in {time.monotonic() - began:.1f} s")
        return metrics

    def loss_of(self, model: Any) -> float:
        """Return the mean loss over the first few rows, computed on this rank only and never interrupted."""
        alone = LockstepBatches(Ranks(), self._batches.size)
        sample = range(len(self._rows.input_ids))[:_SAMPLE]
        with self._evaluating(model):
            sums = alone.run(sample, lambda batch: self.sum_loss(model, batch))
        return sum(loss for _, (loss, _) in sums) / sum(targets for _, (_, targets) in sums)

    def own_loss_of(self, model: Any) -> float:
        """Return the mean loss over the same rows by the logits that `model` itself answers with, row by row.

        Any causal language model of transformers has them, whether its loss is patched or not.
        """
        total, count = 0.0, 0
        with self._evaluating(model):
            for index in range(len(self._rows.input_ids))[:_SAMPLE]:
                ids = torch.tensor([self._rows.input_ids[index]], device=model.device)
                labels = torch.tensor(self._rows.labels[index][1:], device=model.device)
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1]
                total += float(cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum"))
                count += int((labels != IGNORE).sum())
        return total / count

    def sum_loss(self, model: Any, indices: Sequence[int]) -> tuple[float, int]:
        """Return the loss of one batch of rows, summed over its targets, and how many these are."""
        rows = [(self._rows.input_ids[index], self._rows.labels[index]) for index in indices]
        batch = on_device(self._collate(rows), model.device)
        return float(self._method.loss(model, batch)), self._method.targets(batch)

    def _mean_loss(self, model: Any) -> float:
        lengths = self._rows.input_ids
        order = sorted(range(len(lengths)), key=lambda index: len(lengths[index]))
        with nullcontext() if self._sharded else fused(model):
            sums = self._batches.run(order, lambda batch: self.sum_loss(model, batch))
        mine = [sum(loss for _, (loss, _) in sums), float(sum(targets for _, (_, targets) in sums))]
        total, count = _sum_over_ranks(mine, model, self._ranks)
        return total / count

    def _nli_metrics(self, model: Any) -> dict[str, float]:
        settings = self._spec.evaluation.generation

        def answer(batch: Sequence[EvalPrompt]) -> list[tuple[nli.Answer, AnsweredRow | None]]:
            texts = self._generate(model, [each.prompt for each in batch])
            read = [nli.read_answer(text, settings.label_key) for text in texts]
            rows = map(self._answered, batch, texts, read)
            return list(zip(read, rows, strict=True))

        prompts = [each.prompt for each in self._prompts]
        fitting = all_gather(self._ranks, self._generate.rows_at_once(model, prompts))
        self._generations.size = min(self._generations.size, *fitting)
        results = self._generations.run(self._prompts, answer)
        labels = [each.label for batch, _ in results for each in batch]
        read = [each for _, answered in results for each, _ in answered]
        rows = [row for _, answered in results for _, row in answered if row]
        shares = all_gather(self._ranks, (labels, read, rows))
        self.answers = [row for *_, rows in shares for row in rows]
        return nli.score(
            [label for labels, *_ in shares for label in labels], [answer for _, read, _ in shares for answer in read]
        )

    def _answered(self, prompt: EvalPrompt, text: str, read: nli.Answer) -> AnsweredRow | None:
        """Return the row for training/answers.jsonl; None for one that is not among the first."""
        if prompt.row >= MAX_ROWS or not self._spec.evaluation.generation.publish_answers:
            return None
        asked = self._tokenizer.decode(prompt.prompt)
        label = None if read.label is None else str(read.label)
        return AnsweredRow(prompt.row, asked, prompt.answer, text, label, read.label == prompt.label)

    @contextmanager
    def _evaluating(self, model: Any) -> Iterator[None]:
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad(), mixed_precision(model.device, self._spec.training.precision):
                yield
        finally:
            model.train(was_training)


def _sum_over_ranks(values: list[float], model: Any, ranks: Ranks) -> list[float]:
    if ranks.size == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=model.device)
    torch.distributed.all_reduce(tensor)
    return list(tensor.tolist())
