"""The Helm chart under test: where it lies, which values files there are, and its objects as plain data."""

import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "finetune-operator"
RELEASE = "tune"
NAMESPACE = "finetune"
Object = dict[str, Any]

#: name -> file; "defaults" is values.yaml alone.
VALUES_FILES: dict[str, Path | None] = {
    "defaults": None,
    **{path.stem.removeprefix("values-"): path for path in sorted(CHART.glob("values-*.yaml"))},
    **{path.stem: path for path in sorted((ROOT / "tests" / "chart" / "values").glob("*.yaml"))},
}


def values_of(name: str) -> Object:
    """What a user would pass with --values."""
    path = VALUES_FILES[name]
    return yaml.safe_load(path.read_text()) if path else {}


def render(values: Object | None = None, namespace: str = NAMESPACE) -> dict[str, str]:
    """The chart's rendered templates, by path below the chart, those that come out empty left out."""
    return dict(_rendered(json.dumps(values or {}), namespace))


@cache
def _rendered(values: str, namespace: str) -> tuple[tuple[str, str], ...]:
    with helm_python.Chart.load(CHART) as chart:
        rendered = chart.render(json.loads(values), name=RELEASE, namespace=namespace)
    return tuple((path.split("/", 1)[1], text) for path, text in sorted(rendered.items()) if text.strip())


class _Loader(yaml.CSafeLoader):
    """YAML that refuses a key given twice, which PyYAML would silently let the later win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        assert not twice, f"given twice: {twice} {node.start_mark}"
        return super().construct_mapping(node, deep)


def load_all(text: str) -> list[Object]:
    """Every document of `text`."""
    return list(pickle.loads(_documents(text)))


@cache
def _documents(text: str) -> bytes:
    """Most templates come out the same whatever the values; whoever asks gets objects of their own."""
    return pickle.dumps([document for document in yaml.load_all(text, _Loader) if document])


def objects(values: Object | None = None, namespace: str = NAMESPACE) -> list[Object]:
    """Every object the chart makes with `values`."""
    texts = (text for path, text in render(values, namespace).items() if not path.endswith("NOTES.txt"))
    return [obj for text in texts for obj in load_all(text)]


def find(found: list[Object], kind: str, name: str | None = None) -> Object:
    """The one object of `kind` (called `name`)."""
    (match,) = [o for o in found if o["kind"] == kind and name in (None, o["metadata"]["name"])]
    return match
