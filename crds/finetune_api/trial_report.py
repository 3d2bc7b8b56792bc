"""What a trainer of several trials says of each, in few bytes: all of it is part of a termination message."""

from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from finetune_api import exit_codes
from finetune_api.base import ApiModel, FiniteOrNone
from finetune_api.spec_pack import MAX_PACK

TrialPhase = Literal["Pending", "Running", "Suspended", "Stopped", "Succeeded", "Failed"]
ENDED: Final[tuple[TrialPhase, ...]] = ("Stopped", "Succeeded", "Failed")
_MAX_REASON = 64


def _cut(value: Any) -> Any:
    return value[:_MAX_REASON] if isinstance(value, str) else value


class TrialReport(ApiModel):
    """One trial of those that share a process."""

    model_config = ConfigDict(extra="ignore", strict=False)

    name: Annotated[str, Field(max_length=64)]
    """Name of the trial."""
    phase: TrialPhase = "Pending"
    """Where it stands."""
    reason: Annotated[str, BeforeValidator(_cut), Field(max_length=_MAX_REASON)] | None = None
    """Why it failed or was stopped, in one CamelCase word."""
    value: FiniteOrNone = None
    """Final value of the objective's metric."""
    step: Annotated[int, Field(ge=0, le=2**53)] | None = None
    """Optimizer steps done."""
    eval_loss: FiniteOrNone = None
    """Latest evaluation loss (nats per token)."""

    @property
    def has_ended_for_good(self) -> bool:
        """Whether the trial would end so alone, too: not where its process took it along, or it had to fit in there."""
        if self.phase != "Failed":
            return self.phase in ENDED
        outcome = exit_codes.REASONS.get(self.reason or "")
        beside_others = (exit_codes.NOT_PACKABLE, exit_codes.WONT_FIT)
        return outcome is not None and outcome.final and self.reason not in beside_others


def readable(found: Any) -> list[TrialReport]:
    """Return the first rows that can be read: one that cannot must not take the others along."""
    if not isinstance(found, list):
        return []
    kept: dict[str, TrialReport] = {}
    for each in found[: 4 * MAX_PACK]:
        try:
            row = TrialReport.model_validate(each)
        except ValueError:
            continue
        kept.setdefault(row.name, row)
    return list(kept.values())[:MAX_PACK]


TrialReports = Annotated[list[TrialReport], BeforeValidator(readable), Field(max_length=MAX_PACK)]
