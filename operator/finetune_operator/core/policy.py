"""Decide whether a job may run: first its spec, then the administrator's rules. One function per rule."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from finetune_api import constants, manifest, uri
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.settings import Settings

INVALID = "ConfigInvalid"
REFUSED = "PolicyRefused"
PROTECTED_PATHS = ("/dev", "/etc", "/proc", "/run", "/sys", "/var/run")


@dataclass(frozen=True)
class Rejection:
    """Why a job is not accepted; `reason` is ConfigInvalid or PolicyRefused."""

    reason: str
    message: str


def read_spec(job: JobObject) -> FineTuneJobSpec | Rejection:
    """Return the spec with its defaults, or what is wrong with it (an older schema, or no CRD validation)."""
    data = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.KIND,
        "metadata": {"name": job.name, "namespace": job.namespace, "uid": job.uid},
        "spec": json.loads(job.spec),
    }
    try:
        return manifest.check(manifest.Document(data, "")).spec
    except manifest.ManifestError as error:
        return Rejection(INVALID, "; ".join(map(str, error.problems))[:8192])


def check_policy(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Rejection | None:
    """Return the first administrator's rule that the job breaks; None when it breaks none."""
    for rule in _RULES:
        for sentence in rule(job, spec, policy):
            name = rule.__name__.removeprefix("_")
            return Rejection(REFUSED, f"{sentence} (administrator's rule {name})")
    return None


def _allowed_images(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    patterns = policy.allowed_images
    if spec.image and spec.image != policy.trainer_image and not any(fnmatchcase(spec.image, p) for p in patterns):
        yield f"spec.image: {spec.image} is not allowed; allowed: {', '.join((policy.trainer_image, *patterns))}"


def _max_gpus_per_job(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    limit = policy.max_gpus_per_job_by_namespace.get(job.namespace, policy.max_gpus_per_job)
    asked = spec.resources.nodes * spec.resources.gpus_per_node
    if limit is not None and asked > limit:
        yield (
            f"spec.resources: {spec.resources.nodes} nodes x {spec.resources.gpus_per_node} GPUs = {asked} GPUs; "
            f"a job in namespace {job.namespace} may have {limit}"
        )


def _allowed_s3_buckets(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    for field, value in _uris(spec):
        place = uri.parse(value)
        if policy.allowed_s3_buckets and place.scheme == "s3":
            patterns = policy.allowed_s3_buckets
            if not any(fnmatchcase(place.authority, pattern) for pattern in patterns):
                yield f"{field}: bucket {place.authority} is not allowed; allowed: {', '.join(patterns)}"


def _allow_remote_code(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    if spec.model.trust_remote_code and not policy.allow_remote_code:
        yield "spec.model.trustRemoteCode: not allowed on this cluster"


def _allow_file_output(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    for field, value in (("spec.output.uri", spec.output.uri), ("spec.checkpoint.uri", spec.checkpoint.uri)):
        if value and value.startswith("file://") and not policy.allow_file_output:
            yield f"{field}: {value} would be lost with the pod; use s3://bucket/key or pvc://claim/path"


def _protected_paths(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    """Protect the pod's own files: Secrets, tokens, the environment and memory of processes."""
    for field, value in _uris(spec):
        place = uri.parse(value)
        root = next((path for path in PROTECTED_PATHS if f"{place.path}/".startswith(f"{path}/")), None)
        if place.scheme == "file" and root:
            yield f"{field}: {value} is inside protected directory {root}"


_RULES: tuple[Callable[[JobObject, FineTuneJobSpec, Settings], Iterator[str]], ...] = (
    _allowed_images,
    _max_gpus_per_job,
    _allowed_s3_buckets,
    _allow_remote_code,
    _allow_file_output,
    _protected_paths,
)


def _uris(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    candidates: tuple[tuple[str, Any], ...] = (
        ("spec.model.source", spec.model.source),
        ("spec.dataset.train", spec.dataset.train),
        ("spec.dataset.eval", spec.dataset.eval),
        ("spec.lora.initFrom", spec.lora.init_from),
        ("spec.checkpoint.uri", spec.checkpoint.uri),
        ("spec.output.uri", spec.output.uri),
    )
    return ((field, value) for field, value in candidates if value)
