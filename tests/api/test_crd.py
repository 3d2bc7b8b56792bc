"""The generated CRD: up to date, complete, and free of what a structural schema may not hold."""

from pathlib import Path
from typing import Any

import pytest

from finetune_api import crd_sweep
from finetune_api.crd import crd, render
from finetune_api.spec import FineTuneJobSpec

ROOT = Path(__file__).parents[2]
SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


def nodes(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    children = [(f"{path}.{name}", child) for name, child in schema.get("properties", {}).items()]
    inner = (schema.get(key) for key in ("items", "additionalProperties"))
    children += [(f"{path}[]", child) for child in inner if isinstance(child, dict)]
    return [(path, schema)] + [found for name, child in children for found in nodes(child, name)]


@pytest.mark.parametrize("definition", [crd(), crd_sweep.crd()], ids=["job", "sweep"])
def test_the_file_is_what_the_models_say(definition: dict[str, Any]):
    plural = definition["spec"]["names"]["plural"]
    assert (ROOT / f"crds/{plural}.yaml").read_text() == render(definition), "run `make crds`"


def test_every_field_is_described():
    missing = [
        path
        for path, node in nodes(SCHEMA)
        if "description" not in node and path and not path.endswith("[]") and path.count(".") > 1
    ]
    assert missing == []


@pytest.mark.parametrize("path_and_node", nodes(SCHEMA["properties"]["spec"]), ids=lambda pair: pair[0])
def test_every_spec_value_is_bounded(path_and_node: tuple[str, dict[str, Any]]):
    _, node = path_and_node
    kind = node.get("type")
    if kind == "string":
        assert "maxLength" in node or "enum" in node
    if kind in ("integer", "number"):
        assert "enum" in node or "minimum" in node
    if kind == "array":
        assert "maxItems" in node


def test_nothing_that_a_structural_schema_forbids():
    for path, node in nodes(SCHEMA):
        assert not {"$ref", "anyOf", "oneOf", "$defs", "title"} & node.keys(), path
        assert "type" in node or "x-kubernetes-int-or-string" in node, path


def test_defaults_are_the_models_defaults():
    def defaults(schema: dict[str, Any]) -> Any:
        return {
            name: defaults(child) if child.get("default") == {} else child["default"]
            for name, child in schema["properties"].items()
            if "default" in child
        }

    minimal = {
        "model": {"source": "hf://a/b"},
        "dataset": {"train": "s3://data/x"},
        "output": {"uri": "s3://out/x"},
    }
    by_model = FineTuneJobSpec.model_validate(minimal).manifest()
    by_schema = defaults(SCHEMA["properties"]["spec"])
    for section in ("model", "dataset", "output"):
        by_model[section] = {k: v for k, v in by_model[section].items() if k not in minimal[section]}
        by_schema[section] = defaults(SCHEMA["properties"]["spec"]["properties"][section])
    assert by_schema == by_model
