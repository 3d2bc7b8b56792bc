"""The objects an attempt is made of."""

import json
from typing import Any

import pytest

from finetune_api import constants, exit_codes, manifest
from finetune_operator.core.builders import job as children
from finetune_operator.core.objects.observed import JobObject
from finetune_operator.core.policy import Rejection, read_spec
from finetune_operator.settings import Settings
from support.common import kubernetes_schema

Object = dict[str, Any]
FULL = {
    "model": {"source": "pvc://models/mistral", "secretRef": {"name": "hub"}},
    "dataset": {"train": "pvc://data/train.jsonl", "eval": "s3://data/test.jsonl", "secretRef": {"name": "data"}},
    "output": {"uri": "pvc://data/adapters", "secretRef": {"name": "store"}},
    "logging": {"wandb": {"project": "nli", "secretRef": {"name": "wandb"}}},
    "cache": {"claimName": "cache"},
    "resources": {"nodes": 2, "gpusPerNode": 4, "cpu": 8, "memory": "64Gi", "sharedMemory": "16Gi"},
    "training": {"batchSize": 16},
}


def made(attempt: int = 1, micro: int | None = None, settings: Settings | None = None, **spec: Any) -> list[Object]:
    minimal = {
        "model": {"source": "hf://mistralai/Mistral-7B-v0.3"},
        "dataset": {"train": "s3://data/train.jsonl"},
        "output": {"uri": "s3://adapters/nli"},
    }
    obj = {"metadata": {"name": "nli", "namespace": "team", "uid": "u-1"}, "spec": minimal | spec}
    job = JobObject.from_api(obj)
    read = read_spec(job)
    assert not isinstance(read, Rejection), read
    return children.build(job, read, attempt, micro, settings or Settings())


def pod_of(objects: list[Object]) -> Object:
    return objects[-1]["spec"]["template"]["spec"]


def env_of(objects: list[Object]) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in pod_of(objects)["containers"][0]["env"]}


@pytest.mark.parametrize("spec", [{}, FULL], ids=["minimal", "full"])
def test_every_object_is_valid_kubernetes(spec: Object):
    for obj in made(**spec):
        kubernetes_schema.check(obj)


def test_the_pod_meets_the_restricted_pod_security_standard():
    pod = pod_of(made(**FULL))
    container = pod["containers"][0]["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["allowPrivilegeEscalation"] is False
    assert container["capabilities"] == {"drop": ["ALL"]}
    assert container["readOnlyRootFilesystem"] is True
    assert pod["automountServiceAccountToken"] is False
    allowed = {"downwardAPI", "emptyDir", "secret", "persistentVolumeClaim"}
    assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"])


def test_exit_codes_that_end_a_job_are_the_contracts():
    ignore, final = made()[-1]["spec"]["podFailurePolicy"]["rules"]
    assert ignore["action"] == "Ignore"
    assert ignore["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert tuple(final["onExitCodes"]["values"]) == exit_codes.FINAL_EXIT_CODES
    retried = {code for code, outcome in exit_codes.OUTCOMES.items() if code and not outcome.final}
    assert not retried & set(final["onExitCodes"]["values"])


def test_a_lost_rank_of_several_fails_the_whole_attempt():
    assert made(**FULL)[-1]["spec"]["podFailurePolicy"]["rules"][0]["action"] == "FailJob"


def test_secrets_are_mounted_by_role_and_never_read():
    pushed = {"oci": {"uri": "oci://r.example/nli:v1", "secretRef": {"name": "login"}}}
    pushed["hf"] = {"uri": "hf://org/nli", "secretRef": {"name": "writer"}}
    objects = made(**FULL | {"output": FULL["output"] | pushed})
    pod = pod_of(objects)
    by_volume = {volume["name"]: volume.get("secret") for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: by_volume[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    found = {path: secret["secretName"] for path, secret in mounts.items() if secret}
    wanted = {"model": "hub", "dataset": "data", "output": "store", "wandb": "wandb", "oci": "login", "hf": "writer"}
    assert found == {f"{constants.SECRETS_DIR}/{role}": name for role, name in wanted.items()}
    assert not [obj for obj in objects if obj["kind"] == "Secret"]


def test_a_claim_that_is_only_read_is_mounted_read_only_and_each_claim_once():
    pod = pod_of(made(**FULL))
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts[f"{constants.PVC_ROOT}/models"] is True
    assert mounts[f"{constants.PVC_ROOT}/data"] is False, "it is read and written"
    assert constants.CACHE_DIR in mounts


def test_gpus_are_requested_and_limited_and_none_means_none():
    resources = pod_of(made(**FULL))["containers"][0]["resources"]
    assert resources["limits"] == {"memory": "64Gi", "nvidia.com/gpu": 4}
    assert resources["requests"] == {"cpu": 8, "memory": "64Gi", "nvidia.com/gpu": 4}
    assert pod_of(made(resources={"gpusPerNode": 0}))["containers"][0]["resources"] == {}


def test_several_gpus_start_through_torchrun_and_one_does_not():
    assert pod_of(made())["containers"][0]["command"] == ["finetune-trainer"]
    objects = made(**FULL)
    assert [obj["kind"] for obj in objects] == ["Service", "Job"]
    env = env_of(objects)
    assert (env["PET_NNODES"], env["PET_NPROC_PER_NODE"]) == ("2", "4")
    assert env["PET_MASTER_ADDR"] == "nli-1-0.nli-nodes"
    assert pod_of(objects)["subdomain"] == "nli-nodes"
    grace = pod_of(objects)["terminationGracePeriodSeconds"]
    assert 30 < int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace, "torchrun is not to cut a checkpoint short"
    cpu = env_of(made(resources={"nodes": 2, "gpusPerNode": 0}))
    assert not [name for name in cpu if "NCCL" in name], "on CPUs gloo is used"


def test_shared_memory_is_a_memory_volume_of_the_size_asked_for():
    volume = next(v for v in pod_of(made(**FULL))["volumes"] if v["name"] == "shm")
    assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}


def test_the_configuration_is_read_back_by_the_contract_itself():
    objects = made(**FULL)
    config = objects[-1]["spec"]["template"]["metadata"]["annotations"][constants.ANNOTATION_MANIFEST]
    job = manifest.load_text(config, "job.yaml", overrides=["training.microBatchSize=2"])
    assert job.metadata.uid == "u-1"
    assert job.spec.training.micro_batch_size == 2
    assert json.loads(config)["spec"]["resources"]["nodes"] == 2
    (volume,) = [volume for volume in pod_of(objects)["volumes"] if volume["name"] == "config"]
    reference = {"fieldPath": f"metadata.annotations['{constants.ANNOTATION_MANIFEST}']"}
    assert volume["downwardAPI"] == {"items": [{"path": constants.CONFIG_FILE, "fieldRef": reference}]}


def test_after_memory_ran_out_what_the_trainer_may_choose_is_given_as_frugal_arguments():
    def settings(**spec):
        words = pod_of(made(attempt=3, micro=4, **spec))["containers"][0]["args"]
        assert words[:2] == ["--config", "/etc/finetune/job.yaml"]
        assert set(words[2::2]) == {"--set"}
        return words[3::2]

    frugal = ["training.microBatchSize=4", "quantization.cachedLayers=0", "training.gradientCheckpointing=enabled"]
    assert settings() == frugal
    assert settings(quantization={"bits": 16}) == [frugal[0], frugal[2]]
    pinned = {"quantization": {"cachedLayers": 3}, "training": {"gradientCheckpointing": "disabled"}}
    assert settings(**pinned) == frugal[:1]
    assert env_of(made(attempt=3))[constants.ENV_ATTEMPT] == "3"


def test_owner_references_control_but_do_not_block():
    for obj in made(**FULL):
        (owner,) = obj["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["controller"], owner["blockOwnerDeletion"]) == ("u-1", True, False)


AFFINITY = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "In", "values": ["h200"]}]}]
        }
    }
}


def test_placement_reaches_the_pod_as_the_user_wrote_it():
    asked = {
        "priorityClassName": "high",
        "runtimeClassName": "nvidia",
        "affinity": AFFINITY,
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
    }
    objects = made(resources=asked)
    pod = pod_of(objects)
    assert {key: pod[key] for key in asked} == asked
    kubernetes_schema.check(objects[-1])
    assert not set(asked) & set(pod_of(made())), "and nothing is there that nobody asked for"


def test_the_administrators_node_labels_win_and_tolerations_add_up():
    ours = {"key": "spot", "operator": "Exists"}
    settings = Settings(node_selector={"zone": "b", "pool": "gpu"}, tolerations=(ours,))
    theirs = {"key": "gpu", "operator": "Exists"}
    pod = pod_of(made(settings=settings, resources={"nodeSelector": {"zone": "a"}, "tolerations": [theirs, ours]}))
    assert pod["nodeSelector"] == {"zone": "b", "pool": "gpu"}
    assert pod["tolerations"] == [theirs, ours]


def test_a_crash_without_a_report_leaves_its_last_lines():
    assert pod_of(made())["containers"][0]["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_a_pod_without_gpus_is_shown_none():
    assert env_of(made(resources={"gpusPerNode": 0}))["NVIDIA_VISIBLE_DEVICES"] == "void"
    assert "NVIDIA_VISIBLE_DEVICES" not in env_of(made())


def test_limits_of_the_administrator_hold_where_a_job_sets_none():
    limits = Settings(default_memory="32Gi", scratch_size_limit="100Gi")
    pod = pod_of(made(settings=limits))
    assert pod["containers"][0]["resources"]["limits"]["memory"] == "32Gi"
    sizes = {volume["name"]: volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"] if "emptyDir" in volume}
    assert sizes == {"scratch": "100Gi", "tmp": "100Gi", "shm": "8Gi"}
    own = pod_of(made(settings=limits, resources={"memory": "64Gi"}))["containers"][0]["resources"]
    assert own["limits"]["memory"] == own["requests"]["memory"] == "64Gi"


def test_user_namespaces_are_by_choice():
    assert "hostUsers" not in pod_of(made())
    assert pod_of(made(settings=Settings(host_users=False)))["hostUsers"] is False


def test_endpoints_that_are_allowed_are_told_to_the_trainer_in_its_own_environment():
    told = env_of(made(settings=Settings(allowed_hub_endpoints=("https://huggingface.co", "https://*.internal"))))
    assert told[constants.ENV_ALLOWED_ENDPOINTS] == "https://huggingface.co,https://*.internal"
    assert constants.ENV_ALLOWED_ENDPOINTS not in env_of(made())


def test_a_job_of_several_nodes_is_isolated_where_the_administrator_isolates():
    isolated = Settings(isolated_namespaces=("team",))
    service, policy, job = made(settings=isolated, **FULL)
    kubernetes_schema.check(policy)
    assert policy["metadata"]["ownerReferences"] == job["metadata"]["ownerReferences"]
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert policy["spec"]["podSelector"]["matchLabels"] == service["spec"]["selector"]
    assert len(made(settings=isolated)) == 1, "one pod needs nobody"
    assert len(made(settings=Settings(isolated_namespaces=("other",)), **FULL)) == 2
