"""The trials of a sweep: what its spec comes to, and the FineTuneJob of each."""

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from finetune_api import constants, manifest
from finetune_api.sweep import FineTuneSweepSpec
from finetune_api.sweep_trials import PlannedTrial, expand, job_name, trial_spec
from finetune_operator.core.objects.raw import Raw
from finetune_operator.core.policy import INVALID, Rejection
from finetune_operator.core.sweep.observed import SweepObject

#: More than the largest sensible sweep: a template, and a thousand named trials of a few values.
MAX_SPEC_BYTES = 768 * 1024


@dataclass(frozen=True)
class Sweep:
    """A valid sweep: its spec, as models and as plain data, and its trials."""

    spec: FineTuneSweepSpec
    template: dict[str, Any]
    trials: tuple[PlannedTrial, ...]


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
        model = manifest.check_sweep(manifest.Document(data, ""), each_trial=is_new).spec
    except manifest.ManifestError as error:
        return Rejection(INVALID, "; ".join(map(str, error.problems))[:8192])
    return Sweep(model, spec["template"], expand(name, model))


def job_of(sweep: SweepObject, template: dict[str, Any], trial: PlannedTrial) -> Raw:
    """Return the FineTuneJob of a trial. It is named after both, so that no crash can make it twice."""
    owner = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.SWEEP_KIND,
        "name": sweep.name,
        "uid": sweep.uid,
        "controller": True,
    }
    labels = {constants.LABEL_SWEEP: sweep.name, constants.LABEL_TRIAL: trial.name}
    metadata = {
        "namespace": sweep.namespace,
        "name": job_name(sweep.name, trial.name),
        "labels": {**sweep.labels, **labels},
        "ownerReferences": [owner],
    }
    spec = trial_spec(sweep.name, template, trial)
    return {"apiVersion": constants.API_VERSION, "kind": constants.KIND, "metadata": metadata, "spec": spec}
