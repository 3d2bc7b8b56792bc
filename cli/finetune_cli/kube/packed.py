"""Trials that share a FineTuneJob with others: no FineTuneJob has their name, but users know them by it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_api.packed_jobs import trial_uid, trial_uri
from finetune_api.plain_text import one_line
from finetune_api.sweep_trials import job_name
from finetune_cli.errors import CliError

if TYPE_CHECKING:
    from finetune_api.trial_report import TrialReport
    from finetune_cli.kube.objects import Object


@dataclass(frozen=True)
class PackedTrial:
    """A trial of a pack.

    Attributes:
        name: What its FineTuneJob would be called.
        sweep: Its sweep.
        trial: Its name there.
        job: The FineTuneJob that it shares.
        row: Where it stands, as that job tells.
    """

    name: str
    sweep: str
    trial: str
    job: Object
    row: TrialReport

    @property
    def job_name(self) -> str:
        """Name of the FineTuneJob that it shares."""
        return str(self.job["metadata"]["name"])

    @property
    def uri(self) -> str:
        """Where it publishes."""
        return trial_uri(str(_mapping(_mapping(self.job, "spec"), "output").get("uri", "")), self.trial)

    @property
    def uid(self) -> str:
        """With which it publishes."""
        return trial_uid(str(self.job["metadata"].get("uid", "")), self.sweep, self.trial)

    @property
    def standing(self) -> str:
        """Where it stands, in a few words."""
        row = self.row
        told = [
            f"{row.phase} ({one_line(row.reason)})" if row.reason else row.phase,
            *([f"step {row.step:,}"] if row.step else []),
            *([f"held-out loss {row.eval_loss:.4f}"] if row.eval_loss is not None else []),
        ]
        return ", ".join(told)

    @property
    def told(self) -> str:
        """What it is, and where it stands, in one sentence."""
        return (
            f"{self.name} is trial {self.trial} of sweep {self.sweep}, which shares FineTuneJob {self.job_name} with"
            f" others: {self.standing}"
        )


class SharedJob(CliError):
    """A command needs a FineTuneJob, and this trial has none of its own."""

    def __init__(self, trial: PackedTrial, options: str) -> None:
        """`options` are those that name its namespace and cluster."""
        hint = (
            f"finetune status {trial.job_name}{options} shows that job; what is done to it, such as suspend, is done to"
            f" all of its trials: finetune suspend {trial.sweep} --sweep{options}"
        )
        super().__init__(trial.told, hint=hint)
        self.trial = trial


def find(name: str, jobs: Iterable[Object]) -> PackedTrial | None:
    """Return the trial that `name` would be the FineTuneJob of, if one of `jobs` holds it."""
    for job in jobs:
        pack = _mapping(_mapping(job, "spec"), "pack")
        sweep = str(pack.get("sweep", ""))
        for trial in _names(pack):
            if job_name(sweep, trial) == name:
                return PackedTrial(name, sweep, trial, job, _row(job, trial))
    return None


def _row(job: Object, trial: str) -> TrialReport:
    from finetune_api.trial_report import TrialReport, readable

    rows = readable(_mapping(job, "status").get("trials"))
    return next((row for row in rows if row.name == trial), None) or TrialReport(name=trial)


def _names(pack: Object) -> Iterator[str]:
    trials = pack.get("trials")
    for each in trials if isinstance(trials, list) else ():
        if isinstance(each, dict) and isinstance(each.get("name"), str):
            yield each["name"]


def _mapping(found: Object, key: str) -> dict[str, Any]:
    value = found.get(key)
    return value if isinstance(value, dict) else {}
