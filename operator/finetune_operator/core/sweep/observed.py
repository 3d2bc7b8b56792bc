"""A FineTuneSweep and its trials, with only what decisions need."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from pydantic_core import to_json

from finetune_api import constants
from finetune_operator.core.objects import raw
from finetune_operator.core.objects.observed import KEPT_BYTES, JobObject, Observation
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.objects.snapshot import Snapshot

_PASSED_ON = (constants.LABEL_KUEUE_QUEUE, constants.LABEL_KUEUE_PRIORITY)


@dataclass(frozen=True, slots=True)
class SweepObject:
    """A FineTuneSweep. `spec` and `status` are JSON."""

    namespace: str
    name: str
    uid: str
    version: int
    generation: int
    created_at: datetime | None
    deleting: bool
    labels: dict[str, str]
    """Those that its trials get, too."""
    spec: bytes
    status: bytes
    is_whole: bool = True
    """Whether spec and status are here; else they are to be read from the API server."""

    @classmethod
    def from_api(cls, obj: Raw, cost_label: str = "") -> "SweepObject":
        """Read a FineTuneSweep. `cost_label` is the key of the label that costs are summed by."""
        found = raw.labels(obj)
        return cls(
            **raw.identity(obj),
            labels={label: found[label] for label in (*_PASSED_ON, cost_label) if label in found},
            spec=to_json(obj.get("spec")),
            status=to_json(raw.mapping(obj, "status")),
        )

    def kept(self) -> "SweepObject":
        """Return what of the sweep stays in memory: little, whatever it holds."""
        if len(self.spec) + len(self.status) <= KEPT_BYTES:
            return self
        return replace(self, spec=b"{}", status=b"{}", is_whole=False)


@dataclass(frozen=True, kw_only=True)
class ObservedSweep(Observation):
    """Everything that is known of one sweep."""

    sweep: SweepObject
    jobs: Mapping[str, JobObject]
    """The FineTuneJobs that this very sweep controls, by name."""


def observe(snapshot: Snapshot) -> ObservedSweep:
    """Tell the trials of this very sweep from those of an earlier one of the same name."""
    sweep = snapshot.owner
    assert isinstance(sweep, SweepObject)
    found = [view for view in snapshot.children.get(constants.KIND, ()) if isinstance(view, JobObject)]
    mine = [job for job in found if job.trial and job.trial.owner == sweep.uid]
    return ObservedSweep(sweep=sweep, jobs={job.name: job for job in sorted(mine, key=lambda job: job.version)})
