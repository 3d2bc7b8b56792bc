"""Trials without a FineTuneJob of their own: none has their name, but users know them by it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_api import constants
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
        for trial in (each["name"] for each in _named(pack.get("trials"))):
            if job_name(sweep, trial) == name:
                return PackedTrial(name, sweep, trial, job, _row(job, trial))
    return None


def of_sweep(name: str, sweeps: Iterable[Object], options: str) -> CliError | None:
    """Return what to say of a trial whose FineTuneJob is not there yet, or not any more; None if `name` is none's.

    `options` are those that name its namespace and cluster.
    """
    for sweep in sweeps:
        own = str(sweep["metadata"]["name"])
        if not name.startswith(job_name(own, "")):
            continue
        trial = name.removeprefix(job_name(own, ""))
        rows = _named(_mapping(sweep, "status").get("trials"))
        if row := next((row for row in rows if row["name"] == trial), None):
            phase, reason = (one_line(str(row.get(key) or "")) for key in ("phase", "reason"))
            told = f"and its FineTuneJob is gone: {f'{phase} ({reason})' if reason else phase}"
        elif trial in _planned(own, sweep):
            told = "which has not started yet"
        else:
            continue
        return CliError(
            f"{name} is trial {trial} of sweep {own}, {told}", hint=f"finetune status --sweep {own}{options} shows all"
        )
    return None


def _planned(name: str, sweep: Object) -> list[str]:
    """Return the names of a sweep's trials; none of one that is not valid."""
    from finetune_api.manifest import Document, ManifestError, check_sweep
    from finetune_api.sweep_trials import SweepError, expand

    kind = {"apiVersion": constants.API_VERSION, "kind": constants.SWEEP_KIND, "metadata": {"name": name}}
    try:
        checked = check_sweep(Document(kind | {"spec": sweep.get("spec")}, ""), each_trial=False)
        return [trial.name for trial in expand(name, checked.spec)]
    except (ManifestError, SweepError):
        return []


def _row(job: Object, trial: str) -> TrialReport:
    from finetune_api.trial_report import TrialReport, readable

    rows = readable(_mapping(job, "status").get("trials"))
    return next((row for row in rows if row.name == trial), None) or TrialReport(name=trial)


def _named(trials: Any) -> Iterator[dict[str, Any]]:
    """Yield those of `trials` that have a name."""
    for each in trials if isinstance(trials, list) else ():
        if isinstance(each, dict) and isinstance(each.get("name"), str):
            yield each


def _mapping(found: Object, key: str) -> dict[str, Any]:
    value = found.get(key)
    return value if isinstance(value, dict) else {}
