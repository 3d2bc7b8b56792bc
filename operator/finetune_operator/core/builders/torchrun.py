"""Distributed training: torchrun, its rendezvous, and the Service and NetworkPolicy for it."""

from typing import Any

from finetune_api import constants
from finetune_api.spec import FineTuneJobSpec

Object = dict[str, Any]

PORT = 29500
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def is_distributed(spec: FineTuneJobSpec) -> bool:
    return spec.resources.nodes * max(1, spec.resources.gpus_per_node) > 1


def command(spec: FineTuneJobSpec) -> list[str]:
    """Return the container's command; its arguments are the trainer's."""
    return (
        ["torchrun", "--no-python", constants.TRAINER_COMMAND] if is_distributed(spec) else [constants.TRAINER_COMMAND]
    )


def service_name(job_name: str) -> str:
    return f"{job_name}-nodes"


def env(spec: FineTuneJobSpec, child_name: str, grace_seconds: int) -> list[Object]:
    """Return torchrun's options as PET_* variables (torch.distributed.argparse_util). Rank 0 is completion index 0.

    By default torchrun kills its processes 30 s after SIGTERM; they need the pod's `grace_seconds` for a checkpoint.
    """
    if not is_distributed(spec):
        return []
    nodes, processes = spec.resources.nodes, max(1, spec.resources.gpus_per_node)
    job_name = child_name.rpartition("-")[0]
    leader = f"{child_name}-0.{service_name(job_name)}" if nodes > 1 else "127.0.0.1"
    values = {
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": str(processes),
        "PET_MASTER_ADDR": leader,
        "PET_MASTER_PORT": str(PORT),
        "PET_MAX_RESTARTS": "0",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(1, grace_seconds - 5)),
    }
    if spec.resources.gpus_per_node:
        values |= {"NCCL_DEBUG": "WARN", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}
    found: list[Object] = [{"name": key, "value": value} for key, value in values.items()]
    if nodes > 1:
        found.append({"name": "PET_NODE_RANK", "valueFrom": {"fieldRef": {"fieldPath": _INDEX}}})
    return found


def service(job_name: str, metadata: Object) -> Object:
    """Return the headless Service. It publishes addresses before pods are ready, because pods wait for each other.

    Each field has its value as the API server would store it: see core/objects/as_built.py.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**metadata, "name": service_name(job_name)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {constants.LABEL_JOB: job_name},
            "ports": [{"name": "rendezvous", "port": PORT, "targetPort": PORT, "protocol": "TCP"}],
        },
    }


def network_policy(job_name: str, metadata: Object) -> Object:
    """Return the policy that lets the pods of this job reach each other; the chart's lets no other trainer in.

    Neither torchrun's rendezvous nor NCCL knows who connects. NCCL chooses its ports, so all of them are open.
    """
    mine = {"matchLabels": {constants.LABEL_JOB: job_name}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {**metadata, "name": service_name(job_name)},
        "spec": {"podSelector": mine, "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": mine}]}]},
    }
