"""The objects one attempt needs: a Job, and for several nodes a Service and a NetworkPolicy.

The resolved manifest is an annotation of the pods and is mounted from there (downward API). So an attempt and its
manifest are one object, created at once, and no attempt can read the manifest of another.
"""

from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json

from finetune_api import constants, exit_codes
from finetune_api.packed_jobs import pass_layout, sweep_document
from finetune_api.spec import FineTuneJob, FineTuneJobSpec, Metadata
from finetune_operator.core.attempts import history, spec_revision
from finetune_operator.core.builders import node_affinity, pod, torchrun
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.settings import Settings

Object = dict[str, Any]


def build(
    job: JobObject,
    spec: FineTuneJobSpec,
    attempt: int,
    micro_batch: int | None,
    settings: Settings,
    avoided_nodes: Sequence[str] = (),
) -> list[Object]:
    """Return all objects of one attempt, in the order of their creation: the Job comes last.

    Args:
        job: The FineTuneJob.
        spec: Its spec with defaults.
        attempt: Number of the attempt, from 1.
        micro_batch: Micro-batch to force after a GPU out-of-memory, of a pack the rows of all trials in a pass; None
            leaves the choice to the trainer.
        settings: The operator's settings.
        avoided_nodes: Nodes that run it only if no other can.
    """
    made: list[Object] = []
    if spec.resources.nodes > 1:
        metadata = _metadata(job, torchrun.service_name(job.name))
        made.append(torchrun.service(job.name, metadata))
        if job.namespace in settings.isolated_namespaces:
            made.append(torchrun.network_policy(job.name, metadata))
    made.append(_job(job, spec, attempt, micro_batch, settings))
    node_affinity.avoid(made[-1]["spec"]["template"]["spec"], avoided_nodes)
    return made


def _metadata(job: JobObject, name: str, **labels: str) -> Object:
    owner = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.KIND,
        "name": job.name,
        "uid": job.uid,
        "controller": True,
        # True would need the right to update finalizers, and would hold up a foreground deletion.
        "blockOwnerDeletion": False,
    }
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": {**_labels(job), **labels},
        "ownerReferences": [owner],
    }


def _labels(job: JobObject) -> dict[str, str]:
    return {
        "app.kubernetes.io/name": constants.TRAINER_COMMAND,
        "app.kubernetes.io/component": "trainer",
        constants.LABEL_MANAGED_BY: constants.FIELD_MANAGER,
        constants.LABEL_JOB: job.name,
    }


def resolved(job: JobObject, spec: FineTuneJobSpec) -> str:
    """Return the manifest as JSON, which is YAML: the trainer reads exactly what the operator understood.

    That of several trials is a FineTuneSweep of these.
    """
    metadata = Metadata(name=job.name, namespace=job.namespace, uid=job.uid)
    if spec.pack:
        return to_json(sweep_document(metadata, spec)).decode()
    found = FineTuneJob(api_version="finetune.dev/v1alpha1", kind="FineTuneJob", metadata=metadata, spec=spec)
    return found.model_dump_json(by_alias=True, exclude_none=True)


def _low_memory_flags(spec: FineTuneJobSpec, micro_batch: int) -> list[str]:
    """Return the flags of an attempt after a GPU out-of-memory; else the trainer would fill the freed memory."""
    places, rows = pass_layout(spec, micro_batch) if spec.pack else (1, micro_batch)
    settings = [f"training.microBatchSize={rows}"]
    if spec.quantization.bits == 4 and spec.quantization.cached_layers == "auto":
        settings.append("quantization.cachedLayers=0")
    if spec.training.gradient_checkpointing == "auto":
        settings.append("training.gradientCheckpointing=enabled")
    if spec.pack:
        settings = [f"parallelism={places}", *(f"template.{setting}" for setting in settings)]
    return [word for setting in settings for word in ("--set", setting)]


def _job(job: JobObject, spec: FineTuneJobSpec, attempt: int, micro_batch: int | None, settings: Settings) -> Object:
    name, nodes = history.job_name(job, attempt), spec.resources.nodes
    arguments = ["--config", f"{constants.CONFIG_DIR}/{constants.CONFIG_FILE}"]
    if micro_batch is not None:
        arguments += _low_memory_flags(spec, micro_batch)
    labels = {constants.LABEL_ATTEMPT: str(attempt)}
    template = pod.template(job, spec, name, {**_labels(job), **labels}, arguments, attempt, settings)
    template["metadata"]["annotations"][constants.ANNOTATION_MANIFEST] = resolved(job, spec)
    body: Object = {
        "backoffLimit": 0,
        "completions": nodes,
        "parallelism": nodes,
        "completionMode": "Indexed" if nodes > 1 else "NonIndexed",
        "podReplacementPolicy": "Failed",
        "podFailurePolicy": {"rules": _failure_rules(nodes)},
        "template": template,
    }
    if constants.LABEL_KUEUE_QUEUE in job.queue_labels:
        body["suspend"] = True
    metadata = _metadata(job, name, **labels, **job.queue_labels)
    metadata["annotations"] = {constants.ANNOTATION_REVISION: spec_revision.revision_of(spec)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": body,
    }


def _failure_rules(nodes: int) -> list[Object]:
    """Return the pod failure policy (KEP-3329). Anything else fails the Job, because backoffLimit is 0.

    The Job replaces a disrupted single pod. One rank of several cannot rejoin, so the whole attempt starts again.
    """
    return [
        {
            "action": "Ignore" if nodes == 1 else "FailJob",
            "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
        },
        {
            "action": "FailJob",
            "onExitCodes": {
                "containerName": constants.TRAINER_CONTAINER,
                "operator": "In",
                "values": list(exit_codes.FINAL_EXIT_CODES),
            },
        },
    ]
