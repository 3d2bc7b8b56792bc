"""Every constant that two parts of the product share: keys, paths, ports, exit codes."""

from typing import Final

GROUP: Final = "finetune.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "FineTuneJob"
PLURAL: Final = "finetunejobs"
SHORT_NAME: Final = "ftj"
SWEEP_KIND: Final = "FineTuneSweep"
KINDS: Final = (KIND, SWEEP_KIND)
SWEEP_PLURAL: Final = "finetunesweeps"
SWEEP_SHORT_NAME: Final = "fts"

FIELD_MANAGER: Final = "finetune-operator"
LABEL_JOB: Final = f"{GROUP}/job"
LABEL_SWEEP: Final = f"{GROUP}/sweep"
LABEL_TRIAL: Final = f"{GROUP}/trial"
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
ANNOTATION_MANIFEST: Final = f"{GROUP}/manifest"
ANNOTATION_REVISION: Final = f"{GROUP}/spec-revision"
#: Of a trial whose values were drawn when it started: these values, as JSON.
ANNOTATION_VALUES: Final = f"{GROUP}/trial-values"
LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"
#: Of nodes, by NVIDIA's GPU feature discovery: the GPU's name with dashes for its spaces.
LABEL_GPU_PRODUCT: Final = "nvidia.com/gpu.product"
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
#: $HOME of a trainer: nothing can be written there. Programs take configuration from it, some of which runs commands.
NO_HOME: Final = "/nonexistent"
TERMINATION_LOG: Final = "/dev/termination-log"
#: The kubelet divides 12 KiB among a pod's containers: with six more beside the trainer, its report is still whole.
TERMINATION_LOG_MAX_BYTES: Final = 1536
TRAINER_PORT: Final = 9400

ENV_SECRETS_DIR: Final = "FINETUNE_SECRETS_DIR"
ENV_PVC_ROOT: Final = "FINETUNE_PVC_ROOT"
ENV_CACHE_DIR: Final = "FINETUNE_CACHE_DIR"
ENV_SCRATCH_DIR: Final = "FINETUNE_SCRATCH_DIR"
ENV_TERMINATION_LOG: Final = "FINETUNE_TERMINATION_LOG"
ENV_LISTEN: Final = "FINETUNE_LISTEN"  # host:port of /metrics and /progress
ENV_ATTEMPT: Final = "FINETUNE_ATTEMPT"
ENV_NODE: Final = "FINETUNE_NODE"  # the pod's node; set in pods of the operator alone
# Shell patterns of the S3 endpoints an administrator allows, with commas between; none: any.
ENV_ALLOWED_S3_ENDPOINTS: Final = "FINETUNE_ALLOWED_S3_ENDPOINTS"
# The same for the endpoints of model hubs and experiment trackers.
ENV_ALLOWED_ENDPOINTS: Final = "FINETUNE_ALLOWED_ENDPOINTS"
ENV_STORE_PATIENCE: Final = "FINETUNE_STORE_PATIENCE"  # seconds to wait for a store that is out of reach
ENV_STORE_TIMEOUT: Final = "FINETUNE_STORE_TIMEOUT"  # seconds to wait for one answer of a store
# In the output's Secret, or the environment: the ed25519 key that manifests are signed with (PEM).
ENV_SIGNING_KEY: Final = "FINETUNE_SIGNING_KEY"
# In the environment of who reads: the key that manifests must be signed with (PEM, or its file).
ENV_PUBLIC_KEY: Final = "FINETUNE_PUBLIC_KEY"

#: Sub-directories of SECRETS_DIR, one per secretRef of the spec. Each file in one is an environment-style key
#: (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL, HF_TOKEN, WANDB_API_KEY)
#: and wins over the environment variable of the same name for that role.
SECRET_ROLES: Final = ("model", "dataset", "output", "oci", "hf", "wandb")
#: The key of a Secret of type kubernetes.io/dockerconfigjson, in which registries' users and passwords are.
DOCKER_CONFIG_KEY: Final = ".dockerconfigjson"

# In the object store, below output.uri
MANIFEST_FILE: Final = "manifest.json"
CHECKPOINTS_DIR: Final = "checkpoints"
CANDIDATES_DIR: Final = "candidates"
TRAINING_DIR: Final = "training"
METRICS_FILE: Final = f"{TRAINING_DIR}/metrics.jsonl"
ANSWERS_FILE: Final = f"{TRAINING_DIR}/answers.jsonl"
ADAPTER_CONFIG_FILE: Final = "adapter_config.json"
ADAPTER_WEIGHTS_FILE: Final = "adapter_model.safetensors"
