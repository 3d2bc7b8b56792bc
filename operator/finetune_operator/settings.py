"""The operator's settings: environment variables FINETUNE_OPERATOR_<FIELD>; lists and maps are JSON."""

from importlib.metadata import version
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from finetune_api.fields import Quantity

Positive = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """The operator's settings. All defaults suit production; `trainer_image` follows the release."""

    model_config = SettingsConfigDict(
        env_prefix="FINETUNE_OPERATOR_", env_parse_none_str="null", frozen=True, use_attribute_docstrings=True
    )

    # What is served
    namespaces: tuple[str, ...] = ()
    """Namespaces to serve. Empty: the whole cluster, which needs a ClusterRole."""
    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """Jobs reconciled at the same time. More workers shorten the queue and send more API requests."""
    resync_seconds: Positive = 300
    """Seconds between full lists, which find what a watch missed. Longer saves requests and delays such repairs."""
    start_timeout_seconds: Positive = 300
    """Seconds to wait at the start for the API server and the CRD; then the process exits with code 1."""
    request_timeout_seconds: Positive = 30
    """Timeout of one API request in seconds; the reconcile is retried."""
    progress_interval_seconds: Positive = 15
    """Minimum seconds between two polls of one trainer's progress. Shorter updates the status more often."""
    progress_timeout_seconds: Positive = 3
    """Timeout of one poll in seconds; the next one follows after the interval."""
    progress_concurrency: Annotated[int, Field(ge=1, le=1000)] = 32
    """Polls at the same time; further ones wait."""
    stalled_seconds: Annotated[int, Field(ge=1)] = 1800
    """Seconds without a new report after which a job gets Training=False, reason Stalled. It is not stopped."""
    kueue: Literal["auto", "enabled", "disabled"] = "auto"
    """Watch Kueue's Workloads to explain why a queued job waits. auto: when the cluster has them."""

    # The trainer's pods
    trainer_image: str = f"finetune-trainer:{version('finetune-operator')}"
    """Image of the trainer, unless a job sets spec.image."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the trainer's image is pulled."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of pull Secrets; they must exist in the job's namespace."""
    trainer_service_account: str | None = None
    """ServiceAccount of the trainer's pods (for cloud workload identity); we never mount its token."""
    trainer_env: dict[str, str] = {}
    """More environment variables for the trainer, such as proxies. Never secrets."""
    node_selector: dict[str, str] = {}
    """Node labels to require; a job that asks for another value of one is rejected."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints to tolerate, besides a job's own."""
    pod_annotations: dict[str, str] = {}
    """Annotations of the trainer's pods."""
    run_as_user: Annotated[int, Field(ge=1)] | None = 65532
    """User, group and fsGroup of the trainer. null: the image's or the platform's (OpenShift)."""
    termination_grace_seconds: Annotated[int, Field(ge=1, le=3600)] = 120
    """Seconds between SIGTERM and SIGKILL. A trainer that cannot save within them resumes from an older checkpoint."""
    scratch_size_limit: str | None = None
    """Limit of the scratch volume, and of /tmp, such as 100Gi; a pod that exceeds it is evicted. null: no limit."""
    default_memory: Quantity | None = None
    """Memory request and limit of a pod whose job sets no resources.memory, such as 64Gi. null: none."""
    host_users: bool = True
    """Whether pods share the node's user ids. false gives each pod a user namespace (the node must support it)."""
    isolated_namespaces: tuple[str, ...] = ()
    """Namespaces with the chart's NetworkPolicy for trainers; there, only pods of one job reach each other."""

    # What is allowed
    allowed_images: tuple[str, ...] = ()
    """Patterns that spec.image must match, part by part. Empty: only the operator's own image."""
    allowed_s3_buckets: tuple[str, ...] = ()
    """Patterns that every s3:// bucket must match. Empty: any."""
    allowed_s3_endpoints: tuple[str, ...] = ()
    """Patterns that the endpoint URL in a Secret must match; the trainer checks it. Empty: any."""
    allowed_hub_endpoints: tuple[str, ...] = ()
    """The same for the endpoints of model hubs and experiment trackers."""
    allowed_gpu_resources: tuple[str, ...] = ()
    """Patterns that resources.gpuResource must match. Empty: any."""
    allowed_priority_classes: tuple[str, ...] = ()
    """Patterns that resources.priorityClassName must match. Empty: any but system-*."""
    allowed_runtime_classes: tuple[str, ...] = ()
    """Patterns that resources.runtimeClassName must match. Empty: any."""
    allowed_tolerations: tuple[str, ...] = ()
    """Patterns that the taint keys of resources.tolerations must match, besides `tolerations`. Empty: any."""
    max_shared_memory: Quantity | None = "64Gi"
    """Largest resources.sharedMemory, which takes the node's memory. null: any."""
    allow_remote_code: bool = False
    """Whether jobs may set model.trustRemoteCode."""
    allow_file_output: bool = False
    """Whether jobs may write to file://. In a pod such output is lost with the pod."""
    max_gpus_per_job: Annotated[int, Field(ge=0)] | None = None
    """GPUs that one job may request over all its nodes; a job with more is rejected. null: any number."""
    max_gpus_per_job_by_namespace: dict[str, Annotated[int, Field(ge=0)]] = {}
    """The same for single namespaces, instead of the general limit."""

    # What it costs
    gpu_prices: dict[str, Annotated[float, Field(ge=0, le=1_000_000)]] = {}
    """Price of an hour of one GPU by its type: the node label nvidia.com/gpu.product. Other types have no price."""
    currency: Annotated[str, Field(min_length=1, max_length=16)] = "USD"
    """Currency of gpu_prices, as text to show."""

    # How it is watched
    http_host: str = "0.0.0.0"  # noqa: S104 -- the kubelet and Prometheus come from outside the pod
    """Address of /healthz, /readyz and /metrics."""
    http_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of the HTTP endpoints; 0 takes a free one and logs it."""
    stuck_seconds: Positive = 120
    """Seconds that a job may wait for a worker, or a reconcile may run, before /healthz fails and the pod restarts."""
    job_metrics_limit: Annotated[int, Field(ge=0)] = 200
    """Number of running jobs, and of finished ones, with gauges of their own (loss, step); further jobs get none."""
    cost_label: Annotated[str, Field(max_length=317)] = ""
    """Label of FineTuneJobs, such as team, by which GPU time and cost are summed besides the namespace. Empty: none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""

    # Kopf
    watch_server_timeout_seconds: Annotated[int, Field(ge=10)] = 300
    """Seconds after which the API server ends a watch request; Kopf then opens another."""
    watch_client_timeout_seconds: Positive = 330
    """Seconds after which we end a watch request that the server did not end."""
    watch_inactivity_seconds: Positive = 70
    """Seconds without event or bookmark after which a watch restarts; servers send a bookmark every minute."""
