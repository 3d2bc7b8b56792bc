"""The operator's settings: environment variables FINETUNE_OPERATOR_<FIELD>; lists and maps are JSON."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

Positive = Annotated[float, Field(gt=0)]


class Settings(BaseSettings):
    """Every setting has a default that suits production, save `trainer_image`, which follows the release."""

    model_config = SettingsConfigDict(
        env_prefix="FINETUNE_OPERATOR_", env_parse_none_str="null", frozen=True, use_attribute_docstrings=True
    )

    # What is served
    namespaces: tuple[str, ...] = ()
    """Namespaces to serve. Empty: the whole cluster."""
    workers: Annotated[int, Field(ge=1, le=256)] = 16
    """Jobs reconciled at the same time."""
    resync_seconds: Positive = 300
    """Seconds between full lists, which catch whatever a watch has missed."""
    start_timeout_seconds: Positive = 300
    """How long to wait at the start for the API server and the CRD before giving up."""
    request_timeout_seconds: Positive = 30
    """Limit of one API request."""
    progress_interval_seconds: Positive = 15
    """Least seconds between two looks at one trainer's progress."""
    progress_timeout_seconds: Positive = 3
    """Limit of one look."""
    progress_concurrency: Annotated[int, Field(ge=1, le=1000)] = 32
    """Looks at the same time."""
    stalled_seconds: Annotated[int, Field(ge=1)] = 1800
    """A trainer that reports nothing new for this long gets Training=False, reason Stalled."""
    kueue: Literal["auto", "enabled", "disabled"] = "auto"
    """Read Kueue's Workloads to explain what a queued job waits for. auto: when the cluster has them."""

    # The trainer's pods
    trainer_image: str = "finetune-trainer:0.1.0"
    """Image of the trainer."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When the trainer's image is pulled."""
    image_pull_secrets: tuple[str, ...] = ()
    """Names of pull Secrets in the job's namespace."""
    trainer_service_account: str | None = None
    """ServiceAccount of the trainer's pods (for cloud workload identity); its token is never mounted by us."""
    trainer_env: dict[str, str] = {}
    """More environment variables for the trainer, such as proxies. Never secrets."""
    node_selector: dict[str, str] = {}
    """Node labels to require; a job's own selector wins."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints to tolerate, besides a job's own."""
    pod_annotations: dict[str, str] = {}
    """Annotations of the trainer's pods."""
    run_as_user: Annotated[int, Field(ge=1)] | None = 65532
    """User, group and fsGroup of the trainer. null: the image's or the platform's (OpenShift)."""
    termination_grace_seconds: Annotated[int, Field(ge=1, le=3600)] = 120
    """Time a trainer has to save its checkpoint when it is asked to stop."""
    scratch_size_limit: str | None = None
    """Limit of the scratch volume, such as 100Gi."""

    # What is allowed
    allowed_images: tuple[str, ...] = ()
    """Patterns (shell wildcards) that spec.image must match. Empty: only the operator's own image."""
    allowed_s3_buckets: tuple[str, ...] = ()
    """Patterns that every s3:// bucket must match. Empty: any."""
    allowed_s3_endpoints: tuple[str, ...] = ()
    """Patterns that the endpoint URL in a Secret must match; the trainer checks it. Empty: any."""
    allow_remote_code: bool = False
    """Whether jobs may set model.trustRemoteCode."""
    allow_file_output: bool = False
    """Whether output may go to file://, which in a pod is lost with the pod."""
    max_gpus_per_job: Annotated[int, Field(ge=0)] | None = None
    """GPUs that one job may have over all its nodes. null: any number."""
    max_gpus_per_job_by_namespace: dict[str, Annotated[int, Field(ge=0)]] = {}
    """The same for single namespaces, instead of the general limit."""

    # How it is watched
    http_host: str = "0.0.0.0"  # noqa: S104 -- the kubelet and Prometheus come from outside the pod
    """Address of /healthz, /readyz and /metrics."""
    http_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of the same; 0 takes a free one and logs it."""
    stuck_seconds: Positive = 120
    """/healthz fails when a job has waited this long for a worker, or a reconcile has run this long."""
    job_metrics_limit: Annotated[int, Field(ge=0)] = 200
    """Running jobs that get gauges of their own (loss, step, tokens/s); those beyond it get none."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level that is logged."""

    # Kopf
    watch_server_timeout_seconds: Annotated[int, Field(ge=10)] = 300
    """How long the API server may keep one watch request."""
    watch_client_timeout_seconds: Positive = 330
    """How long we keep it, should the server forget."""
    watch_inactivity_seconds: Positive = 70
    """A watch without event or bookmark for this long is renewed (servers send bookmarks each minute)."""
