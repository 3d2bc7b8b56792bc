"""An adapter that an earlier attempt of the same job has published."""

from finetune_trainer.checkpoints.manager import CheckpointManager
from finetune_trainer.context import RunContext
from finetune_trainer.publishing.publish import AdapterOutput


def published_earlier(ctx: RunContext, output: AdapterOutput, checkpoints: CheckpointManager) -> str:
    """Load the published adapter back, report its metrics and delete the checkpoints; return what to say.

    Raises:
        StoreCorrupted: The adapter is gone, or is not what its manifest says.
    """
    from finetune_trainer.publishing.export import report_published  # these import torch
    from finetune_trainer.publishing.verify import load_back

    found = ctx.on_rank_zero(lambda: load_back(output, ctx.directory.published))
    ctx.report.metrics(found.metrics or {})
    ctx.report.progress(step=found.step or 0, total_steps=found.step)
    if not ctx.ranks.is_main:
        return ""
    checkpoints.delete_unless_kept()
    return f"An earlier attempt has published the adapter at {output.store.root}{report_published(ctx)}"
