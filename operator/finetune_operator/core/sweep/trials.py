"""The trials of a sweep: what its spec comes to, and the FineTuneJob of each."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from finetune_api import constants, exit_codes, manifest, sweep_tpe
from finetune_api.exit_codes import OUTPERFORMED, ExitCode
from finetune_api.sweep import FineTuneSweep, FineTuneSweepSpec
from finetune_api.sweep_packs import Holder, pack_spec, singles
from finetune_api.sweep_status import TrialStatus
from finetune_api.sweep_tpe import Past
from finetune_api.sweep_trials import PlannedTrial, expand, job_name, trial_spec
from finetune_api.trial_report import ENDED
from finetune_operator.core.objects.observed import TrialState
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.policy import INVALID, Rejection
from finetune_operator.core.sweep.observed import SweepObject

#: More than the largest sensible sweep: a template, and a thousand named trials of a few values.
MAX_SPEC_BYTES = 768 * 1024
_DIVERGED = exit_codes.OUTCOMES[ExitCode.DIVERGED].reason


@dataclass(frozen=True)
class Sweep:
    """A valid sweep: as a model, its template as plain data, and its trials."""

    manifest: FineTuneSweep
    template: dict[str, Any]
    trials: tuple[PlannedTrial, ...]

    @property
    def spec(self) -> FineTuneSweepSpec:
        return self.manifest.spec


def read(sweep: SweepObject, is_new: bool) -> Sweep | Rejection:
    """Return the sweep with its trials, or what is wrong with it.

    Args:
        sweep: The sweep.
        is_new: Whether to check that each trial is a valid FineTuneJob: a third of a second for a thousand.
    """
    if len(sweep.spec) > MAX_SPEC_BYTES:
        return Rejection(INVALID, f"spec: Too long: {len(sweep.spec)} bytes: a valid one has at most {MAX_SPEC_BYTES}")
    return _read(sweep.name, sweep.spec, is_new)


@lru_cache(maxsize=8)
def _read(name: str, text: bytes, is_new: bool) -> Sweep | Rejection:
    # Cached, for a sweep is planned after each change of its trials.
    spec = json.loads(text)
    data = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.SWEEP_KIND,
        "metadata": {"name": name},
        "spec": spec,
    }
    try:
        model = manifest.check_sweep(manifest.Document(data, ""), each_trial=is_new)
    except manifest.ManifestError as error:
        return Rejection(INVALID, "; ".join(map(str, error.problems))[:8192])
    if is_new and model.spec.strategy == "tpe" and not sweep_tpe.is_installed():
        return Rejection(INVALID, f"spec.strategy: {sweep_tpe.MISSING}")
    return Sweep(model, spec["template"], expand(name, model.spec))


def holders(sweep: SweepObject, found: Sweep, packed_for: int | None) -> tuple[Holder, ...]:
    """Return the FineTuneJobs of the sweep.

    Args:
        sweep: The sweep.
        found: What was read of it.
        packed_for: The parallelism for which its trials were packed when it started; None where each has its own job.
    """
    if packed_for is None or found.spec.packing == "disabled" or found.spec.strategy == "tpe":
        return singles(found.trials)
    return _holders(sweep.name, sweep.spec, packed_for)


@lru_cache(maxsize=16)
def _holders(name: str, text: bytes, packed_for: int) -> tuple[Holder, ...]:
    found = _read(name, text, False)
    assert isinstance(found, Sweep)
    try:
        return manifest.holders_of(found.manifest, packed_for)
    except manifest.ManifestError:  # a trial that an earlier version of this operator accepted: its job tells
        return singles(found.trials)


def drawn(
    name: str,
    sweep: Sweep,
    rows: Mapping[str, TrialStatus],
    states: Mapping[str, TrialState],
    due: Sequence[PlannedTrial],
) -> list[PlannedTrial]:
    """Return the trials `due` of the sweep `name` with values that follow from the results so far. Raises SweepError.

    What was drawn is made durable by creating the trial's FineTuneJob, and never drawn again.
    """
    spec, found = sweep.spec, []
    history = [_past(rows[each.name], states.get(each.name), spec) for each in sweep.trials if each.name in rows]
    for trial in due:

        def why_invalid(values: dict[str, Any], trial: PlannedTrial = trial) -> str:
            return manifest.trial_problem(name, sweep.template, replace(trial, values=values))

        values = sweep_tpe.suggest(spec.parameters or (), spec.objective, spec.drawn_with, history, why_invalid)
        history.append(Past(values))
        found.append(replace(trial, values=values))
    return found


def _past(row: TrialStatus, state: TrialState | None, spec: FineTuneSweepSpec) -> Past:
    """Return what a trial that has started tells of its values."""
    values = state.drawn if state else {}
    if row.phase == "Succeeded":
        return Past(values, "succeeded", row.value)
    if row.reason in (OUTPERFORMED, _DIVERGED):
        rungs = spec.early_stopping.rungs if spec.early_stopping else []
        return Past(values, "behind", losses=dict(zip(rungs, row.rungs or (), strict=False)))
    return Past(values, "lost" if row.phase in ENDED else "running")


def job_of(sweep: SweepObject, found: Sweep, holder: Holder, drawn: PlannedTrial | None = None) -> Raw:
    """Return the FineTuneJob of one trial or several. It is always named the same, so that no crash makes it twice.

    Args:
        sweep: The sweep.
        found: What was read of it.
        holder: The job.
        drawn: Its trial, where the values do not follow from the sweep's spec: they are annotated.
    """
    owner = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.SWEEP_KIND,
        "name": sweep.name,
        "uid": sweep.uid,
        "controller": True,
    }
    labels = {constants.LABEL_SWEEP: sweep.name}
    trials = {trial.name: trial for trial in found.trials if trial.name in holder.trials}
    if holder.is_pack:
        values = {name: trial.values for name, trial in trials.items()}
        spec = pack_spec(sweep.name, found.spec, found.template, holder, values)
    else:
        labels[constants.LABEL_TRIAL] = holder.name
        spec = trial_spec(sweep.name, found.template, drawn or trials[holder.name])
    metadata: dict[str, Any] = {
        "namespace": sweep.namespace,
        "name": job_name(sweep.name, holder.name),
        "labels": {**sweep.labels, **labels},
        "ownerReferences": [owner],
    }
    if drawn:
        metadata["annotations"] = {constants.ANNOTATION_VALUES: json.dumps(drawn.values)}
    return {"apiVersion": constants.API_VERSION, "kind": constants.KIND, "metadata": metadata, "spec": spec}
