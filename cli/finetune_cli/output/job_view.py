"""A FineTuneJob as the cluster returned it, read for showing. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from finetune_api import answers, exit_codes
from finetune_api.plain_text import plain_values
from finetune_api.status import Condition, FineTuneJobStatus

State = Literal["succeeded", "failed", "suspended", "waiting", "running"]

_CURES = {outcome.reason: outcome.cure for outcome in exit_codes.REASONS.values() if outcome.code}


def gpus_of(spec: Mapping[str, Any]) -> int | None:
    """Return the GPUs of a run; None where its spec does not say."""
    resources = spec.get("resources")
    if not isinstance(resources, dict):
        return None
    nodes, each = resources.get("nodes", 1), resources.get("gpusPerNode", 1)
    is_right = all(isinstance(count, int) and 0 <= count <= 10_000 for count in (nodes, each))
    return nodes * each if is_right else None


@dataclass(frozen=True)
class View:
    """What the pages show of one job. `status` is empty for a job the operator has not seen yet."""

    name: str
    namespace: str
    created: datetime | None
    spec: dict[str, Any]
    status: FineTuneJobStatus
    is_cut: bool = False
    """Whether something in it nests too deep to be read."""
    unseen: str = ""
    """Why no operator has seen it, as far as that was asked."""

    @classmethod
    def of(cls, job: dict[str, Any], unseen: str = "") -> View:
        """Read a job; a status of another version that cannot be read counts as empty."""
        from pydantic import ValidationError

        job = plain_values(job)
        metadata = job.get("metadata") or {}
        try:
            status = FineTuneJobStatus.model_validate(job.get("status") or {})
        except ValidationError:
            status = FineTuneJobStatus()
        created = metadata.get("creationTimestamp")
        return cls(
            name=str(metadata.get("name", "")),
            namespace=str(metadata.get("namespace", "")),
            created=datetime.fromisoformat(created) if created else None,
            spec=job.get("spec") or {},
            status=status,
            is_cut=answers.TOO_DEEP in json.dumps([job.get("spec"), job.get("status")]),
            unseen=unseen,
        )

    def condition(self, kind: str) -> Condition | None:
        """Return the condition of that type."""
        return next((each for each in self.status.conditions if each.type == kind), None)

    def is_true(self, kind: str) -> bool:
        """Whether the condition of that type holds."""
        found = self.condition(kind)
        return found is not None and found.status == "True"

    @property
    def state(self) -> State:
        """The one thing to know about the job, from its conditions."""
        succeeded = self.condition("Succeeded")
        if succeeded and succeeded.status != "Unknown":
            return "succeeded" if succeeded.status == "True" else "failed"
        if self.is_true("Suspended") or (self.spec.get("suspend") is True and not self.is_true("Training")):
            return "suspended"
        return "running" if self.is_true("Training") or self.is_true("Scheduled") else "waiting"

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.state in ("succeeded", "failed")

    @property
    def is_kept_back(self) -> bool:
        """Whether it succeeded, but its adapter did not meet publish.onlyIf."""
        succeeded = self.condition("Succeeded")
        return self.state == "succeeded" and succeeded is not None and succeeded.reason == exit_codes.GATE_NOT_PASSED

    @property
    def phase(self) -> str:
        """The operator's word for it."""
        if self.is_cut:
            return "Unreadable"
        return self.status.phase or ("Suspended" if self.spec.get("suspend") else "Pending")

    @property
    def explanation(self) -> tuple[str, str]:
        """Reason and sentence for where the job is: why it waits, is suspended or failed, or what it does now.

        Both are empty when there is nothing to explain.
        """
        if self.is_cut and self.state != "failed":
            return "Why", f"something in its spec is {answers.TOO_DEEP}: delete the job and create it anew"
        if not self.status.conditions:
            return "Why", "The operator has not seen this job yet" + (f": {self.unseen}" if self.unseen else "")
        if self.state == "running":
            training = self.condition("Training")
            tells = training is not None and training.message and self.phase != "Training"
            return (training.reason, training.message) if training and tells else ("", "")
        blamed = {
            "failed": ("Succeeded",),
            "succeeded": ("Succeeded",) if self.is_kept_back else (),
            "suspended": ("Suspended",),
            "waiting": ("Accepted", "Scheduled", "Succeeded"),
        }
        for kind in blamed.get(self.state, ()):
            found = self.condition(kind)
            if found and found.message and (self.state != "waiting" or found.status != "True"):
                return found.reason, found.message
        return "", ""

    @property
    def why(self) -> str:
        """The explanation's sentence."""
        return self.explanation[1]

    @property
    def cure(self) -> str:
        """What to do about a failure, by its reason; empty when there is nothing to do or to say."""
        succeeded = self.condition("Succeeded")
        if self.state == "failed" and succeeded:
            last = self.status.attempts[-1].reason if self.status.attempts else None
            return _CURES.get(succeeded.reason) or _CURES.get(last or "", "")
        if self.is_kept_back and self.status.candidate:
            return f"finetune promote {self.status.candidate.uri}, to serve it all the same"
        is_asked = self.state == "suspended" and self.spec.get("suspend") is True
        return f"finetune resume {self.name} -n {self.namespace}" if is_asked else ""

    @property
    def is_stalled(self) -> bool:
        """Whether the pods run and the trainer no longer steps."""
        training = self.condition("Training")
        return self.state == "running" and training is not None and training.reason == "Stalled"

    def gpu_hours(self, now: datetime | None = None) -> float | None:
        """Return the GPUs multiplied by the hours that its pods have run, up to `now`; None if that is not known."""
        gpus, earlier = gpus_of(self.spec), self.status.earlier_attempts
        held = float(earlier.run_seconds) if earlier else 0.0
        for attempt in self.status.attempts:
            if attempt.run_seconds is not None:
                held += attempt.run_seconds
            elif attempt.started_at and attempt.finished_at:
                held += max(0.0, (attempt.finished_at - attempt.started_at).total_seconds())
            if now and attempt.reason is None and attempt.started_at and self.is_true("Scheduled"):
                held += max(
                    0.0, (now - max(attempt.started_at, attempt.ran_until or attempt.started_at)).total_seconds()
                )
        return gpus * held / 3600 if held and gpus is not None else None

    @property
    def seconds(self) -> float | None:
        """Seconds from the first attempt to the end; None while it runs."""
        start, end = self.status.start_time, self.status.completion_time
        return (end - start).total_seconds() if start and end else None
