"""Every constant that two parts of the product share: keys, paths, ports, exit codes."""

from dataclasses import dataclass
from enum import IntEnum
from typing import Final

GROUP: Final = "finetune.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "FineTuneJob"
PLURAL: Final = "finetunejobs"
SHORT_NAME: Final = "ftj"

FIELD_MANAGER: Final = "finetune-operator"
LABEL_JOB: Final = f"{GROUP}/job"
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
ANNOTATION_MANIFEST: Final = f"{GROUP}/manifest"
ANNOTATION_REVISION: Final = f"{GROUP}/spec-revision"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
LABEL_KUEUE_QUEUE: Final = "kueue.x-k8s.io/queue-name"
LABEL_KUEUE_PRIORITY: Final = "kueue.x-k8s.io/priority-class"

#: The child Job adds "-<attempt>", its pods add more; all of it must stay within a DNS label of 63.
MAX_NAME_LENGTH: Final = 50
NAME_PATTERN: Final = rf"^[a-z]([a-z0-9-]{{0,{MAX_NAME_LENGTH - 2}}}[a-z0-9])?$"
NAME_RULE: Final = (
    f"must be at most {MAX_NAME_LENGTH} lowercase letters, digits and dashes, a letter first and no dash last,"
    " for it names pods and hosts"
)

# In the trainer's container. Each path is also an environment variable, so that a process outside a pod can move it.
TRAINER_CONTAINER: Final = "trainer"
TRAINER_COMMAND: Final = "finetune-trainer"
CONFIG_DIR: Final = "/etc/finetune"
CONFIG_FILE: Final = "job.yaml"
SECRETS_DIR: Final = "/var/run/secrets/finetune"
PVC_ROOT: Final = "/mnt/pvc"
CACHE_DIR: Final = "/mnt/cache"
SCRATCH_DIR: Final = "/scratch"
TERMINATION_LOG: Final = "/dev/termination-log"
TERMINATION_LOG_MAX_BYTES: Final = 4096
TRAINER_PORT: Final = 9400

ENV_SECRETS_DIR: Final = "FINETUNE_SECRETS_DIR"
ENV_PVC_ROOT: Final = "FINETUNE_PVC_ROOT"
ENV_CACHE_DIR: Final = "FINETUNE_CACHE_DIR"
ENV_SCRATCH_DIR: Final = "FINETUNE_SCRATCH_DIR"
ENV_TERMINATION_LOG: Final = "FINETUNE_TERMINATION_LOG"
ENV_LISTEN: Final = "FINETUNE_LISTEN"  # host:port of /metrics and /progress
ENV_ATTEMPT: Final = "FINETUNE_ATTEMPT"
# Shell patterns of the S3 endpoints an administrator allows, with commas between; none: any.
ENV_ALLOWED_S3_ENDPOINTS: Final = "FINETUNE_ALLOWED_S3_ENDPOINTS"
ENV_STORE_PATIENCE: Final = "FINETUNE_STORE_PATIENCE"  # seconds to wait for a store that is out of reach

#: Sub-directories of SECRETS_DIR, one per secretRef of the spec. Each file in one is an environment-style key
#: (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, HF_TOKEN, WANDB_API_KEY)
#: and wins over the environment variable of the same name for that role.
SECRET_ROLES: Final = ("model", "dataset", "output", "wandb")

# In the object store, below output.uri
MANIFEST_FILE: Final = "manifest.json"
CHECKPOINTS_DIR: Final = "checkpoints"
TRAINING_DIR: Final = "training"
METRICS_FILE: Final = f"{TRAINING_DIR}/metrics.jsonl"
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"
ADAPTER_WEIGHTS_FILE: Final = "adapter_model.safetensors"


class ExitCode(IntEnum):
    """What the trainer's exit code says. Numbers follow BSD sysexits.h where it has one."""

    SUCCEEDED = 0
    DATASET_INVALID = 65  # EX_DATAERR
    UNAVAILABLE = 69  # EX_UNAVAILABLE
    PREEMPTED = 75  # EX_TEMPFAIL
    ACCESS_DENIED = 77  # EX_NOPERM
    CONFIG_INVALID = 78  # EX_CONFIG
    GPU_OUT_OF_MEMORY = 90
    DIVERGED = 91
    KILLED = 137  # 128 + SIGKILL


@dataclass(frozen=True)
class Outcome:
    """One way an attempt ends: the reason shown in status, whether another attempt could help, and what to do."""

    code: int
    reason: str
    final: bool
    cause: str
    cure: str


#: Of two outcomes with one exit code, the first is what the code alone says; who tells the other is said beside it.
_OUTCOMES: Final = (
    Outcome(
        ExitCode.SUCCEEDED,
        "Succeeded",
        True,
        "The adapter is published and was loaded back.",
        "Nothing to do: download the adapter.",
    ),
    Outcome(
        ExitCode.DATASET_INVALID,
        "DatasetInvalid",
        True,
        "A data file is missing, empty, or has rows the trainer cannot read.",
        "Fix the file and line the message names, then create the job again.",
    ),
    Outcome(
        ExitCode.UNAVAILABLE,
        "Unavailable",
        False,
        "The object store or the model hub did not answer, or kept answering with server errors.",
        "It is retried with backoff. If it lasts: check the endpoint, DNS and NetworkPolicies.",
    ),
    Outcome(
        ExitCode.PREEMPTED,
        "Preempted",
        False,
        "The pod was asked to stop (node drained, spot reclaimed, job suspended) and saved a checkpoint.",
        "Nothing to do: the next attempt resumes, and this one is not counted.",
    ),
    Outcome(
        ExitCode.ACCESS_DENIED,
        "AccessDenied",
        True,
        "The store or the hub refused the credentials, or they do not allow this path.",
        "Check the Secret named by secretRef and what its key may read or write.",
    ),
    Outcome(
        ExitCode.CONFIG_INVALID,
        "ConfigInvalid",
        True,
        "The manifest asks for something that cannot be done.",
        "Change the field the message names.",
    ),
    Outcome(  # told by the trainer's report
        ExitCode.CONFIG_INVALID,
        "WontFit",
        True,
        "The run needs more GPU memory than the GPU has, found before the weights were loaded.",
        "Take one of the changes the message lists.",
    ),
    Outcome(
        ExitCode.GPU_OUT_OF_MEMORY,
        "GpuOutOfMemory",
        False,
        "The GPU ran out of memory while training.",
        "It is retried with half the micro-batch and the same effective batch. At micro-batch 1: lower maxLength.",
    ),
    Outcome(
        ExitCode.DIVERGED,
        "Diverged",
        True,
        "The loss became NaN or infinite.",
        "Lower learningRate, raise warmupRatio, or look at the data around the step named.",
    ),
    Outcome(
        ExitCode.KILLED,
        "Killed",
        False,
        "The container was killed (SIGKILL), and not for reaching its memory limit.",
        "It is retried. If it lasts: look at the node (memory pressure, its kernel log) and at who may kill there.",
    ),
    Outcome(  # told by the kubelet
        ExitCode.KILLED,
        "OOMKilled",
        True,
        "The kernel ended the container: its host memory reached resources.memory, or the node had none left.",
        "Raise resources.memory above the limit the message names, or set it where it names none.",
    ),
)

#: Every outcome by its reason.
REASONS: Final[dict[str, Outcome]] = {outcome.reason: outcome for outcome in _OUTCOMES}
#: What each exit code says by itself.
OUTCOMES: Final[dict[int, Outcome]] = {outcome.code: outcome for outcome in reversed(_OUTCOMES)}


def outcome_of(code: int, reason: str | None = None) -> Outcome | None:
    """The outcome of an exit code; where several share it, the one that `reason` names."""
    named = REASONS.get(reason or "")
    return named if named and named.code == code else OUTCOMES.get(code)


#: Exit codes after which a second attempt would fail in the same way, whatever the reason.
FINAL_EXIT_CODES: Final = tuple(
    sorted(
        int(code) for code in OUTCOMES if code and all(outcome.final for outcome in _OUTCOMES if outcome.code == code)
    )
)
