"""The trainer's pod template: container, volumes, and the restricted Pod Security Standard."""

from typing import Any

from finetune_api import constants, manifest, uri
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.core.builders import torchrun
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.settings import Settings

Object = dict[str, Any]

METRICS_PORT = "metrics"
TEMP_DIR = "/tmp"  # noqa: S108 -- a mount of the container, not of this machine
_SECRET_MODE = 0o440


def template(job: JobObject, spec: FineTuneJobSpec, name: str, labels: dict[str, str], arguments: list[str],
             attempt: int, settings: Settings) -> Object:  # fmt: skip
    """Return the pod template of attempt `attempt`, whose Job is `name`."""
    volumes, mounts = _volumes(job, spec, settings)
    pod: Object = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.termination_grace_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _pod_security(settings),
        "containers": [
            {
                "name": constants.TRAINER_CONTAINER,
                "image": spec.image or settings.trainer_image,
                "imagePullPolicy": settings.image_pull_policy,
                "command": torchrun.command(spec),
                "args": arguments,
                "env": _env(spec, name, attempt, settings),
                "ports": [{"name": METRICS_PORT, "containerPort": constants.TRAINER_PORT, "protocol": "TCP"}],
                "resources": _resources(spec, settings),
                "volumeMounts": mounts,
                "terminationMessagePath": constants.TERMINATION_LOG,
                # A crash before the report, such as a failed import, shows its last lines. Logs never hold a secret.
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": True,
                    "runAsNonRoot": True,
                },
            }
        ],
        "volumes": volumes,
        **_placement(spec, settings),
    }
    if settings.trainer_service_account:
        pod["serviceAccountName"] = settings.trainer_service_account
    if not settings.host_users:
        pod["hostUsers"] = False
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": secret} for secret in settings.image_pull_secrets]
    if spec.resources.nodes > 1:
        pod["subdomain"] = torchrun.service_name(job.name)
    annotations = {"kubectl.kubernetes.io/default-container": constants.TRAINER_CONTAINER, **settings.pod_annotations}
    return {"metadata": {"labels": labels, "annotations": annotations}, "spec": pod}


def _pod_security(settings: Settings) -> Object:
    context: Object = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    if settings.run_as_user is not None:
        user = settings.run_as_user
        context |= {"runAsUser": user, "runAsGroup": user, "fsGroup": user, "fsGroupChangePolicy": "OnRootMismatch"}
    return context


def _placement(spec: FineTuneJobSpec, settings: Settings) -> Object:
    """Return where the pod may run: the administrator's node labels over the user's; tolerations of both."""
    asked = spec.resources.manifest()
    tolerations = [*asked.get("tolerations", [])]
    tolerations += [toleration for toleration in settings.tolerations if toleration not in tolerations]
    found: Object = {
        "nodeSelector": {**asked.get("nodeSelector", {}), **settings.node_selector},
        "tolerations": tolerations,
        "affinity": asked.get("affinity"),
        "priorityClassName": asked.get("priorityClassName"),
        "runtimeClassName": asked.get("runtimeClassName"),
    }
    return {key: value for key, value in found.items() if value}


def _resources(spec: FineTuneJobSpec, settings: Settings) -> Object:
    asked = spec.resources
    memory = settings.default_memory if asked.memory is None else asked.memory
    limits: Object = {}
    requests: Object = {}
    if asked.cpu is not None:
        requests["cpu"] = asked.cpu
    if memory is not None:
        requests["memory"] = limits["memory"] = memory
    if asked.gpus_per_node:
        requests[asked.gpu_resource] = limits[asked.gpu_resource] = asked.gpus_per_node
    return {key: value for key, value in (("requests", requests), ("limits", limits)) if value}


def _env(spec: FineTuneJobSpec, name: str, attempt: int, settings: Settings) -> list[Object]:
    values = {
        constants.ENV_SECRETS_DIR: constants.SECRETS_DIR,
        constants.ENV_PVC_ROOT: constants.PVC_ROOT,
        constants.ENV_CACHE_DIR: constants.CACHE_DIR if spec.cache else f"{constants.SCRATCH_DIR}/cache",
        constants.ENV_SCRATCH_DIR: constants.SCRATCH_DIR,
        constants.ENV_TERMINATION_LOG: constants.TERMINATION_LOG,
        constants.ENV_LISTEN: f"0.0.0.0:{constants.TRAINER_PORT}",
        constants.ENV_ATTEMPT: str(attempt),
        "HOME": constants.NO_HOME,
        "TMPDIR": TEMP_DIR,
        # A container runtime shows every GPU of the node to an image that asks for all and to a pod that requests none.
        **({} if spec.resources.gpus_per_node else {"NVIDIA_VISIBLE_DEVICES": "void"}),
        **settings.trainer_env,
    }
    if settings.allowed_s3_endpoints:
        values[constants.ENV_ALLOWED_S3_ENDPOINTS] = ",".join(settings.allowed_s3_endpoints)
    if settings.allowed_hub_endpoints:
        values[constants.ENV_ALLOWED_ENDPOINTS] = ",".join(settings.allowed_hub_endpoints)
    plain = [{"name": key, "value": value} for key, value in values.items()]
    node = {"name": constants.ENV_NODE, "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    return [*plain, node, *torchrun.env(spec, name, settings.termination_grace_seconds)]


def _volumes(job: JobObject, spec: FineTuneJobSpec, settings: Settings) -> tuple[list[Object], list[Object]]:
    """Return the volumes and their mounts."""
    volumes: list[Object] = []
    mounts: list[Object] = []

    def mount(volume: str, path: str, source: Object, read_only: bool = False) -> None:
        volumes.append({"name": volume, **source})
        mounts.append({"name": volume, "mountPath": path, **({"readOnly": True} if read_only else {})})

    scratch = {"sizeLimit": settings.scratch_size_limit} if settings.scratch_size_limit else {}
    field = {"fieldPath": f"metadata.annotations['{constants.ANNOTATION_MANIFEST}']"}
    config = {"items": [{"path": constants.CONFIG_FILE, "fieldRef": field}]}
    mount("config", constants.CONFIG_DIR, {"downwardAPI": config}, True)
    mount("scratch", constants.SCRATCH_DIR, {"emptyDir": scratch})
    mount("tmp", TEMP_DIR, {"emptyDir": scratch})
    mount("shm", "/dev/shm", {"emptyDir": {"medium": "Memory", "sizeLimit": str(spec.resources.shared_memory)}})  # noqa: S108
    for role, secret in secret_names(spec).items():
        source = {"secret": {"secretName": secret, "optional": False, "defaultMode": _SECRET_MODE}}
        mount(f"secret-{role}", f"{constants.SECRETS_DIR}/{role}", source, True)
    claims = [claim_names(each) for each in (spec, *manifest.trial_specs(job.name, spec).values())]
    writable = {name for found in claims for name, read_only in found.items() if not read_only}
    for index, claim in enumerate(sorted({name for found in claims for name in found})):
        read_only = claim not in writable
        source = {"persistentVolumeClaim": {"claimName": claim, **({"readOnly": True} if read_only else {})}}
        mount(f"pvc-{index}", f"{constants.PVC_ROOT}/{claim}", source, read_only)
    if spec.cache:
        mount("cache", constants.CACHE_DIR, {"persistentVolumeClaim": {"claimName": spec.cache.claim_name}})
    return volumes, mounts


def secret_names(spec: FineTuneJobSpec) -> dict[str, str]:
    """Return the names of Secrets by role (constants.SECRET_ROLES)."""
    wandb = spec.logging.wandb
    found = {
        "model": spec.model.secret_ref,
        "dataset": spec.dataset.secret_ref,
        "output": spec.output.secret_ref,
        "oci": spec.output.oci.secret_ref if spec.output.oci else None,
        "hf": spec.output.hf.secret_ref if spec.output.hf else None,
        "wandb": wandb.secret_ref if wandb else None,
    }
    return {role: secret.name for role in constants.SECRET_ROLES if (secret := found[role])}


def claim_names(spec: FineTuneJobSpec) -> dict[str, bool]:
    """Return the PersistentVolumeClaims of the pvc:// URIs, and whether each is read-only."""
    found: dict[str, bool] = {}
    reads = (spec.model.source, *spec.dataset.uris.values(), spec.lora.init_from)
    reads += tuple(each.better_than for each in (spec.publish.only_if if spec.publish else ()))
    for value, read_only in (*((v, True) for v in reads), (spec.output.uri, False), (spec.checkpoint.uri, False)):
        place = uri.parse(value) if value else None
        if place and place.scheme == "pvc":
            found[place.authority] = found.get(place.authority, True) and read_only
    return found
