"""Decide whether a job may run: first its spec, then the administrator's rules. One function per rule."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from finetune_api import constants, manifest, uri, wildcard
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.core import image_reference
from finetune_operator.core.objects import quantity
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.settings import Settings

INVALID = "ConfigInvalid"
REFUSED = "PolicyRefused"
_MAX_SENTENCE = 900
PROTECTED_PATHS = ("/dev", "/etc", "/proc", "/run", "/sys", "/var/run")


#: More than the schema lets a spec hold; one stored before it had bounds is not even looked at.
MAX_SPEC_BYTES = 220 * 1024


@dataclass(frozen=True)
class Rejection:
    """Why a job is not accepted; `reason` is ConfigInvalid or PolicyRefused."""

    reason: str
    message: str


def read_spec(job: JobObject) -> FineTuneJobSpec | Rejection:
    """Return the spec with its defaults, or what is wrong with it (an older schema, or no CRD validation)."""
    if len(job.spec) > MAX_SPEC_BYTES:
        return Rejection(INVALID, f"spec: Too long: {len(job.spec)} bytes: a valid one has at most {MAX_SPEC_BYTES}")
    read = _read_again if b'"pack":' in job.spec else _read
    return read(job.name, job.namespace, job.uid, job.spec)


def _read(name: str, namespace: str, uid: str, text: bytes) -> FineTuneJobSpec | Rejection:
    data = {
        "apiVersion": constants.API_VERSION,
        "kind": constants.KIND,
        "metadata": {"name": name, "namespace": namespace, "uid": uid},
        "spec": json.loads(text),
    }
    try:
        return manifest.check(manifest.Document(data, "")).spec
    except manifest.ManifestError as error:
        return Rejection(INVALID, "; ".join(map(str, error.problems))[:8192])


#: Checking the trials of a pack takes ten milliseconds, and each report of its trainer is a plan.
_read_again = lru_cache(maxsize=64)(_read)


def check_policy(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Rejection | None:
    """Return the first administrator's rule that the job or one of its trials breaks; None when it breaks none."""
    for trial, each in {"": spec, **manifest.trial_specs(job.name, spec)}.items():
        whose = f"trial {trial}: " if trial else ""
        for name, rule in RULES.items():
            for sentence in rule(job, each, policy):
                return Rejection(REFUSED, f"{_shortened(whose + sentence)} (administrator's rule {name})")
    return None


def _shortened(sentence: str) -> str:
    """Return the sentence, cut where a long list of what is allowed would push the rule's name out of an event."""
    return sentence if len(sentence) <= _MAX_SENTENCE else f"{sentence[:_MAX_SENTENCE]}…"


def _images(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    allowed = policy.allowed_images
    is_own = spec.image in (None, policy.trainer_image)
    if spec.image and not is_own and not any(image_reference.is_allowed(spec.image, pattern) for pattern in allowed):
        yield f"spec.image: {spec.image} is not allowed; allowed: {', '.join((policy.trainer_image, *allowed))}"


def _gpus(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    limit = policy.max_gpus_per_job_by_namespace.get(job.namespace, policy.max_gpus_per_job)
    asked = spec.resources.nodes * spec.resources.gpus_per_node
    if limit is not None and asked > limit:
        yield (
            f"spec.resources: {spec.resources.nodes} nodes x {spec.resources.gpus_per_node} GPUs = {asked} GPUs; "
            f"a job in namespace {job.namespace} may have {limit}"
        )


def _gpu_resources(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    if spec.resources.gpus_per_node:
        yield from _not_in(policy.allowed_gpu_resources, "spec.resources.gpuResource", spec.resources.gpu_resource)


def _shared_memory(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    asked, limit = spec.resources.shared_memory, policy.max_shared_memory
    if limit is not None and quantity.value(asked) > quantity.value(limit):
        yield f"spec.resources.sharedMemory: {asked} is more than the {limit} that a pod may have"


def _priority_classes(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    field, asked = "spec.resources.priorityClassName", spec.resources.priority_class_name
    if asked:
        yield from _not_in(policy.allowed_priority_classes, field, asked)
        if asked.startswith("system-") and not policy.allowed_priority_classes:
            yield f"{field}: {asked} is for the cluster's own pods and would evict them; take another class"


def _runtime_classes(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    if asked := spec.resources.runtime_class_name:
        yield from _not_in(policy.allowed_runtime_classes, "spec.resources.runtimeClassName", asked)


def _tolerations(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    """Compare keys. A toleration without one tolerates every taint: only the pattern * allows it."""
    for index, toleration in enumerate(spec.resources.tolerations or ()):
        if toleration.manifest() not in policy.tolerations:
            field = f"spec.resources.tolerations[{index}].key"
            yield from _not_in(policy.allowed_tolerations, field, toleration.key or "")


def _node_selector(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    for label, value in (spec.resources.node_selector or {}).items():
        required = policy.node_selector.get(label, value)
        if value != required:
            yield f"spec.resources.nodeSelector: {label}={value} is not allowed; trainers run on {label}={required}"


def _s3_buckets(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    for field, value in _uris(spec):
        place = uri.parse(value)
        if place.scheme == "s3":
            yield from _not_in(policy.allowed_s3_buckets, field, place.authority, "bucket ")


def _remote_code(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
    if spec.model.trust_remote_code and not policy.allow_remote_code:
        yield "spec.model.trustRemoteCode: not allowed on this cluster"


def _file_output(job: JobObject, spec: FineTuneJobSpec, policy: Settings) -> Iterator[str]:
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


#: The rules, by the name an administrator knows: the chart's value, or what has none.
RULES: dict[str, Callable[[JobObject, FineTuneJobSpec, Settings], Iterator[str]]] = {
    "policy.allowedImages": _images,
    "policy.maxGpusPerJob": _gpus,
    "policy.allowedGpuResources": _gpu_resources,
    "policy.maxSharedMemory": _shared_memory,
    "policy.allowedPriorityClasses": _priority_classes,
    "policy.allowedRuntimeClasses": _runtime_classes,
    "policy.allowedTolerations": _tolerations,
    "trainer.nodeSelector": _node_selector,
    "policy.allowedS3Buckets": _s3_buckets,
    "policy.allowRemoteCode": _remote_code,
    "file output": _file_output,
    "protected paths": _protected_paths,
}


def _not_in(allowed: Sequence[str], field: str, asked: str, what: str = "") -> Iterator[str]:
    """Yield a sentence when there are `allowed` patterns and `asked` matches none."""
    if allowed and not any(wildcard.matches(asked, pattern) for pattern in allowed):
        shown = f"{what}{asked}" if asked else "an empty key, which tolerates every taint,"
        yield f"{field}: {shown} is not allowed; allowed: {', '.join(allowed)}"


def _uris(spec: FineTuneJobSpec) -> Iterator[tuple[str, str]]:
    return ((f"spec.{field}", value) for field, value in spec.uris.items())
