"""Asynchronous successive halving: which running trials fall behind. Decides on what FineTuneJobs report, no more."""

from collections.abc import Mapping, Sequence

from finetune_api.exit_codes import OUTPERFORMED
from finetune_api.spec_pack import Halving
from finetune_api.sweep_status import TrialStatus
from finetune_api.trial_report import ENDED
from finetune_operator.core.objects.observed import TrialState


def halve(
    rows: Sequence[TrialStatus], states: Mapping[str, TrialState], halving: Halving
) -> tuple[list[TrialStatus], list[str]]:
    """Return the rows with what trials reached, those that fell behind as stopped, and a sentence for each of these.

    A trial is compared once at each rung, when it passes it, with all that passed it before or at the same time: the
    best 1 in `reductionFactor` go on, at least one. Nothing waits for the slower ones.
    """
    passed = {row.name: _values(row, states.get(row.name), halving) for row in rows}
    by_rung = [
        sorted(values[rung] for values in passed.values() if len(values) > rung) for rung in range(len(halving.rungs))
    ]
    after, stopped = [], []
    for row in rows:
        values, known = passed[row.name], len(row.rungs or ())
        changed = row.model_copy(update={"rungs": values}) if len(values) > known else row
        behind = next(
            (rung for rung in range(known, len(values)) if halving.is_behind(values[rung], by_rung[rung])), None
        )
        if behind is not None and row.phase not in ENDED:
            changed = changed.model_copy(update={"phase": "Stopped", "reason": OUTPERFORMED})
            better = sum(value < values[behind] for value in by_rung[behind])
            stopped.append(
                f"trial {row.name} stopped after step {halving.rungs[behind]}: evalLoss {values[behind]:.4g},"
                f" and {better} of {len(by_rung[behind])} trials were better there"
            )
        after.append(changed)
    return after, stopped


def _values(row: TrialStatus, state: TrialState | None, halving: Halving) -> list[float]:
    """Return the trial's evalLoss at each rung it has passed.

    At the rung's own step the latest evalLoss may still be an older one: the evaluation follows the step.
    """
    values = list(row.rungs or ())[: len(halving.rungs)]
    if state is None or state.eval_loss is None:
        return values
    for step in halving.rungs[len(values) :]:
        if state.step > step or (state.step == step and state.outcome == "True"):
            values.append(state.eval_loss)
    return values
