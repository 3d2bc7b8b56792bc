"""What an earlier attempt of the same job has published, or kept back."""

from finetune_api.status import Adapter
from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.context import RunContext
from finetune_trainer.publishing.gate import candidate_output, verdict
from finetune_trainer.publishing.publish import AdapterOutput


def ended_earlier(ctx: RunContext, output: AdapterOutput, checkpoints: CheckpointManager) -> Adapter | None:
    """Check that the output can be written; finish a run whose adapter an earlier attempt has published or kept back.

    Returns:
        That adapter, loaded back, with its metrics reported and the checkpoints deleted; None where training is left.

    Raises:
        StoreCorrupted: The adapter is gone, or is not what its manifest says.
        StoreError: See AdapterOutput.find_published.
    """
    for place in (output, *([candidate_output(ctx.settings)] if ctx.spec.publish else [])):
        if adapter := ctx.on_rank_zero(place.find_published):
            return _finish(ctx, place, adapter, checkpoints, is_published=place is output)
    return None


def _finish(
    ctx: RunContext, place: AdapterOutput, adapter: Adapter, checkpoints: CheckpointManager, *, is_published: bool
) -> Adapter:
    from finetune_trainer.publishing.export import report_published  # these import torch
    from finetune_trainer.publishing.verify import load_back

    found = ctx.on_rank_zero(lambda: load_back(place, ctx.directory.published))
    ctx.report.metrics(found.metrics or {})
    ctx.report.progress(step=found.step or 0, total_steps=found.step)
    ctx.report.gate(found.gate or [])
    if ctx.ranks.is_main:
        checkpoints.finish()
    if not is_published:
        return ctx.kept_back(adapter, verdict(found.gate or []))
    beside = report_published(ctx) if ctx.ranks.is_main else ""
    return ctx.succeeded(adapter, f"An earlier attempt has published the adapter at {adapter.uri}{beside}")
