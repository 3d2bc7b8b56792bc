"""The largest FineTuneJob that the schema takes, for measuring what many of them cost."""

from typing import Any

from finetune_api.fields import COLUMNS
from finetune_api.spec_affinity import MAX_ENTRIES, MAX_TERMS
from finetune_api.spec_pack import MAX_PACK, MAX_PACKED_VALUES

Object = dict[str, Any]
_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"
#: A letter that takes four bytes, where any text will do.
_TEXT = "𝒶" * 256


def _name(length: int, start: str) -> str:
    return start + "a" * (length - len(start))


def _key(index: int) -> str:
    return f"{_name(253, f'k{index}-')}/{_name(63, f'n{index}-')}"


def _labels(count: int) -> dict[str, str]:
    return {_key(index): "v" * 63 for index in range(count)}


def _pods() -> Object:
    """As many terms as there may be, and in the first ones as many labels."""
    terms: list[Object] = [{"topologyKey": _key(index)} for index in range(2 * MAX_TERMS)]
    terms[0]["labelSelector"] = terms[-1]["namespaceSelector"] = {"matchLabels": _labels(MAX_ENTRIES // 2)}
    preferred = [{"weight": 100, "podAffinityTerm": term} for term in terms[MAX_TERMS:]]
    return {_REQUIRED: terms[:MAX_TERMS], _PREFERRED: preferred}


def _nodes() -> Object:
    """Expressions without values: a key is longer than what a value takes."""
    expressions = [{"key": _key(index), "operator": "DoesNotExist"} for index in range(MAX_ENTRIES)]
    terms = [{"matchExpressions": expressions[start : start + 4]} for start in range(0, MAX_ENTRIES, 4)]
    empty = [{"weight": 100, "preference": {}}] * MAX_TERMS
    return {_REQUIRED: {"nodeSelectorTerms": terms}, _PREFERRED: empty}


def _trial(index: int) -> Object:
    """Values of the largest size: blanks, as JSON may have them."""
    return {"name": _name(40, f"t{index}-"), "values": f'{{"training.seed": {index}}}'.ljust(MAX_PACKED_VALUES)}


def largest_job(name: str) -> Object:
    """A FineTuneJob with all fields at their bounds; what its pack refuses, such as wandb, is smaller than that."""

    def uri(place: str, length: int = 1024) -> str:
        return _name(length, f"s3://bucket/{place}/")

    secret, written = {"name": _name(253, "secret")}, 1024 - len(f"/{_name(40, 't')}/")  # each trial writes below
    toleration = {"operator": "Equal", "value": "v" * 63, "effect": "NoExecute", "tolerationSeconds": 2**31 - 1}
    tolerations = [toleration | {"key": _key(index)} for index in range(32)]
    spec: Object = {
        "model": {"source": uri("model"), "revision": "r" * 128, "secretRef": secret},
        "dataset": {
            "train": uri("train"),
            "eval": uri("eval"),
            "template": "{𝒶}" + "𝒶" * 4093,
            "columns": {column: _TEXT for column in COLUMNS if column != "text"},
            "textField": _TEXT,
            "secretRef": secret,
        },
        "lora": {"targetModules": [_name(128, f"m{index}") for index in range(64)], "initFrom": uri("from")},
        "evaluation": {"metrics": ["loss", "nli"], "generation": {"answerMarker": _TEXT, "labelKey": _TEXT}},
        "checkpoint": {"uri": uri("checkpoints", written)},
        "resources": {
            "gpuResource": f"{_name(189, 'example')}/{_name(63, 'gpu')}",
            "cpu": "1" * 31 + "k",
            "memory": "1" * 30 + "Ki",
            "nodeSelector": _labels(32),
            "tolerations": tolerations,
            "affinity": {"nodeAffinity": _nodes(), "podAffinity": _pods(), "podAntiAffinity": _pods()},
            "priorityClassName": _name(253, "priority"),
            "runtimeClassName": _name(253, "runtime"),
        },
        "cache": {"claimName": _name(253, "cache")},
        "output": {"uri": uri("output", written), "secretRef": secret},
        "image": _name(512, "registry.example.com/"),
        "pack": {"sweep": _name(9, "s"), "trials": [_trial(index) for index in range(MAX_PACK)]},
    }
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": spec,
    }
