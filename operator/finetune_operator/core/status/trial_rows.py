"""The trials of a pack in the status of its FineTuneJob: what its trainers have said of them, over all attempts."""

from collections.abc import Sequence

from finetune_api.spec_pack import Pack
from finetune_api.status import TrainerReport
from finetune_api.trial_report import ENDED, TrialReport

#: Reason of a trial whose process ended for good before it did.
UNFINISHED = "Unfinished"


def merge(known: Sequence[TrialReport], report: TrainerReport | None, pack: Pack) -> list[TrialReport]:
    """Return a row for each trial. One that has ended for good stays so, unless it is published after all.

    Figures stay until there are newer ones.
    """
    before, told = ({row.name: row for row in rows} for rows in (known, report.trials if report else ()))
    rows = []
    for trial in pack.trials:
        old = before.get(trial.name) or TrialReport(name=trial.name)
        new = told.get(trial.name, old)
        if old.has_ended_for_good and (old.phase == "Succeeded" or new.phase != "Succeeded"):
            new = old
        kept = {"step": max(old.step or 0, new.step or 0) or None, "eval_loss": new.eval_loss or old.eval_loss}
        rows.append(new.model_copy(update=kept))
    return rows


def end(rows: Sequence[TrialReport]) -> list[TrialReport]:
    """Return the rows of a job that is over: what has not ended until then will not."""
    unfinished = {"phase": "Failed", "reason": UNFINISHED}
    return [row if row.phase in ENDED else row.model_copy(update=unfinished) for row in rows]
