"""The base model's metrics, of before the training: measured once, and kept in spec.cache for jobs like this one."""

from collections.abc import Sequence
from typing import Any

import structlog

from finetune_api.status import ExecutionPlan
from finetune_trainer.context import RunContext
from finetune_trainer.data.dataset import TokenizedDataset
from finetune_trainer.evaluation.baseline_cache import BaselineCache, baseline_depends_on, can_be_kept
from finetune_trainer.evaluation.evaluator import EvalPrompt, Evaluator
from finetune_trainer.model.base import BaseModel

log = structlog.get_logger(__name__)


def measured_or_kept(
    ctx: RunContext,
    evaluator: Evaluator,
    model: Any,
    plan: ExecutionPlan,
    base: BaseModel,
    rows: TokenizedDataset,
    prompts: Sequence[EvalPrompt],
) -> dict[str, float]:
    """Return the base model's metrics: from the shared cache, or measured and kept there.

    Args:
        ctx: The run.
        evaluator: Measures `model`.
        model: The PEFT model, whose adapter changes nothing yet.
        plan: How the run is laid out.
        base: What is known of the base model.
        rows: Those that are evaluated.
        prompts: Rows to answer.

    Raises:
        EvaluationAborted: The process was asked to stop.
    """
    kept = None
    folder = ctx.settings.environment.cache
    if ctx.ranks.is_main and folder is not None and can_be_kept(ctx.spec, plan, len(base.new_tokens.ids)):
        parts = baseline_depends_on(model, ctx.spec, plan, base.tokenizer, rows, prompts)
        kept = BaselineCache(folder / "evaluations", parts)
    known: dict[str, float] | None = ctx.on_rank_zero(lambda: kept.find() if kept else None)
    if known:
        log.info("An earlier job measured the same base model on the same rows, in the same way")
        return known
    found = evaluator.evaluate(model)
    if kept:
        kept.keep(found)
    return found
