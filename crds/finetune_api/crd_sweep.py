"""The CustomResourceDefinition of FineTuneSweeps. `python -m finetune_api.crd_sweep` prints it."""

import sys
from typing import Any

from finetune_api import constants
from finetune_api.crd import Column, definition, model_schema, render
from finetune_api.spec_pack import SWEEP_NAME
from finetune_api.sweep import FROZEN, FineTuneSweepSpec
from finetune_api.sweep_status import FineTuneSweepStatus

_COLUMNS: tuple[Column, ...] = (
    ("Phase", "string", ".status.phase", "Where the sweep stands", 0),
    ("Trials", "string", ".status.summary", "Trials that have ended / in all", 0),
    ("Best", "string", ".status.best.trial", "Best trial so far", 0),
    ("Value", "number", ".status.best.value", "Its value of the objective", 0),
    ("Age", "date", ".metadata.creationTimestamp", "Since creation", 0),
    ("Metric", "string", ".spec.objective.metric", "What is compared", 1),
    ("Adapter", "string", ".status.best.uri", "Where the best adapter lies", 1),
    ("Reason", "string", '.status.conditions[?(@.type=="Succeeded")].reason', "Why it stands there", 1),
)


def _rules() -> list[dict[str, Any]]:
    """One rule on the name, and one transition rule for each field that the trials follow from."""
    rules: list[dict[str, Any]] = [
        {
            "rule": f"oldSelf.hasValue() || {SWEEP_NAME.cel_of('self.metadata.name')}",
            "optionalOldSelf": True,
            "message": f"metadata.name {SWEEP_NAME.message}",
        }
    ]
    started = "has(oldSelf.status) && has(oldSelf.status.startTime)"
    fields = {field.alias: field for field in FineTuneSweepSpec.model_fields.values()}
    for name in FROZEN:
        new, old = f"self.spec.{name}", f"oldSelf.spec.{name}"
        is_optional = not fields[name].is_required() and fields[name].get_default(call_default_factory=True) is None
        same = f"has({new}) == has({old}) && (!has({new}) || {new} == {old})" if is_optional else f"{new} == {old}"
        rules.append(
            {
                "rule": f"!({started}) || ({same})",
                "message": "cannot change once the sweep has started: create another sweep",
                "fieldPath": f".spec.{name}",
                "reason": "FieldValueForbidden",
            }
        )
    return rules


def crd() -> dict[str, Any]:
    """Return the CustomResourceDefinition as plain data."""
    schema = {
        "description": "Fine-tuning runs that differ in a few fields: one FineTuneJob each, compared by one metric.",
        "spec": model_schema(FineTuneSweepSpec),
        "status": model_schema(FineTuneSweepStatus),
    }
    kind, plural, short = constants.SWEEP_KIND, constants.SWEEP_PLURAL, constants.SWEEP_SHORT_NAME
    return definition(kind, plural, short, _COLUMNS, schema, _rules())


if __name__ == "__main__":
    sys.stdout.write(render(crd()))
