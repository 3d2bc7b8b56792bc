"""A FineTuneJob of packed trials, and the manifest that its trainer gets: a FineTuneSweep of exactly these. Pure."""

import uuid
from typing import Any

from pydantic_core import from_json

from finetune_api import constants
from finetune_api.gate import candidate_uri
from finetune_api.spec import FineTuneJobSpec, Metadata
from finetune_api.sweep_trials import job_name

#: What a job decides as a whole: nothing that its trainer would have to know.
OF_THE_JOB = ("pack", "suspend", "activeDeadlineSeconds", "pendingDeadlineSeconds", "ttlSecondsAfterFinished")


def sweep_document(metadata: Metadata, spec: FineTuneJobSpec) -> dict[str, Any]:
    """Return the FineTuneSweep of the trials in `spec.pack`, which carries the job's uid."""
    pack = spec.pack
    assert pack is not None
    template = {key: value for key, value in spec.manifest().items() if key not in OF_THE_JOB}
    trials = [{"name": each.name, "values": from_json(each.values)} for each in pack.trials]
    sweep = {
        "template": template,
        "trials": trials,
        "parallelism": pack.at_once,
        "objective": pack.objective.manifest(),
        # A trainer that would tell nothing of its trials does not know this field, and refuses the document.
        "packing": "auto",
    }
    if pack.early_stopping:
        sweep["earlyStopping"] = pack.early_stopping.manifest()
    identity = {"namespace": metadata.namespace, "uid": metadata.uid}
    return {
        "apiVersion": constants.API_VERSION,
        "kind": constants.SWEEP_KIND,
        "metadata": {"name": pack.sweep, **{key: value for key, value in identity.items() if value}},
        "spec": sweep,
    }


def pass_layout(spec: FineTuneJobSpec, rows: int) -> tuple[int, int]:
    """Return how `rows` rows at a time are laid out: how many trials of the pack train together, and the rows of each.

    Whole steps of fewer trials come before parts of a step.
    """
    asked, batch = spec.training.micro_batch_size, spec.training.batch_size
    most = batch if asked == "auto" else int(asked)
    if rows >= most:
        return min(rows // most, spec.pack.at_once if spec.pack else 1), most
    return 1, next(size for size in range(max(1, rows), 0, -1) if batch % size == 0)


def trial_uri(output: str, trial: str) -> str:
    """Return where a trial publishes, given output.uri of its sweep's template, or of its pack."""
    return f"{output.rstrip('/')}/{trial}/"


def trial_uid(uid: str, sweep: str, trial: str) -> str:
    """Return the uid with which a trial publishes that shares the FineTuneJob `uid` with others."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{uid}/{job_name(sweep, trial)}"))


def places(metadata: Metadata, spec: FineTuneJobSpec) -> tuple[set[str], set[str]]:
    """Return where a job's adapters may lie, of a pack each trial's, and those that did not meet publish.onlyIf."""
    output, uid = spec.output.uri, metadata.uid or ""
    if spec.pack is None:
        return {output}, {candidate_uri(output, metadata.name, uid)} if spec.publish else set()
    sweep = spec.pack.sweep
    outputs = {each.name: trial_uri(output, each.name) for each in spec.pack.trials}
    candidates = {
        candidate_uri(place, job_name(sweep, name), trial_uid(uid, sweep, name)) for name, place in outputs.items()
    }
    return set(outputs.values()), candidates if spec.publish else set()
