"""Sections of the spec: checkpoints, logging, what each pod asks for, and what happens after a failure."""

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.fields import (
    ExtendedResource,
    LabelKey,
    Labels,
    LabelValue,
    Name,
    PositiveInt,
    Quantity,
    Text,
    WritableUri,
)
from finetune_api.spec_affinity import Affinity
from finetune_api.spec_data import SecretRef


class Checkpoint(ApiModel):
    """Saved states to resume from."""

    every_steps: PositiveInt = 500
    """Optimizer steps between checkpoints. One is also saved when the pod is asked to stop."""
    keep: Annotated[int, Field(ge=1, le=100)] = 2
    """Checkpoints to keep; older ones are deleted."""
    uri: WritableUri | None = None
    """Where checkpoints go; {name} stands for the job's name. Default: checkpoints/ under output.uri."""


class Wandb(ApiModel):
    """Weights & Biases."""

    project: Text
    """Project."""
    name: Text | None = None
    """Run name. Default: the job's name."""
    entity: Text | None = None
    """Team or user."""
    secret_ref: SecretRef | None = None
    """Secret with WANDB_API_KEY."""


class Logging(ApiModel):
    """What the run reports, and how often."""

    every_steps: PositiveInt = 10
    """Optimizer steps between log lines and metric updates."""
    wandb: Wandb | None = None
    """Off unless given."""


class Toleration(ApiModel):
    """A pod toleration, as in Kubernetes."""

    key: LabelKey | None = None
    """Taint key; empty with operator Exists matches all."""
    operator: Literal["Exists", "Equal"] | None = None
    """Exists or Equal (the default)."""
    value: LabelValue | None = None
    """Taint value, for Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect to tolerate; empty means all."""
    toleration_seconds: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """For NoExecute: how long."""


class Resources(ApiModel):
    """What each pod asks for and where it may run."""

    nodes: Annotated[int, Field(ge=1, le=512)] = 1
    """Pods, one a node."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs per pod. 0 trains on the CPU, for trials."""
    gpu_resource: ExtendedResource = "nvidia.com/gpu"
    """Extended resource that stands for one GPU."""
    gpu_memory: Quantity | None = None
    """Memory of one GPU to plan with, where the plan is wrong about what fits; the GPU's own if not given."""
    cpu: Quantity | None = None
    """CPU request."""
    memory: Quantity | None = None
    """Memory request and limit."""
    shared_memory: Quantity = "8Gi"
    """Size of /dev/shm (a memory-backed volume; NCCL needs more than the default 64 MiB)."""
    node_selector: Labels | None = None
    """Node labels to require."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] | None = None
    """Taints to tolerate."""
    affinity: Affinity | None = None
    """Pod affinity, as in Kubernetes."""
    priority_class_name: Name | None = None
    """PriorityClass of the pods."""
    runtime_class_name: Name | None = None
    """RuntimeClass of the pods."""


class Recovery(ApiModel):
    """What happens after a failed attempt that another one could mend."""

    max_attempts: Annotated[int, Field(ge=1, le=100)] = 4
    """Attempts in all. Preemptions are not counted."""
    on_out_of_memory: Literal["ReduceMicroBatch", "Fail"] = "ReduceMicroBatch"
    """After a GPU out-of-memory: halve the micro-batch (same effective batch), or fail."""
    backoff_seconds: Annotated[int, Field(ge=0, le=86_400)] = 10
    """Wait before the second attempt; it doubles each time, up to ten minutes."""
