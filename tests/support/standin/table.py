"""Lists as kubectl wants to print them: meta.k8s.io/v1 Tables with the CRD's printer columns. Pure."""

import re
from datetime import UTC, datetime
from typing import Any

from support.standin.types import Resource

Object = dict[str, Any]

_NAME = {"name": "Name", "type": "string", "format": "name", "description": "Name", "priority": 0}
_AGE = {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"}
_STEP = re.compile(r"\.([A-Za-z0-9_-]+)|\[\?\(@\.(\w+)==\"([^\"]*)\"\)\]")


def table(resource: Resource, objects: list[Object], revision: str) -> Object:
    """The Table of `objects`; kinds without printer columns show name and age."""
    columns = list(resource.columns) or [_AGE]
    definitions = [_NAME, *({"format": "", "description": "", "priority": 0} | _public(column) for column in columns)]
    rows = [
        {
            "cells": [obj["metadata"]["name"], *(_cell(column, obj) for column in columns)],
            "object": {"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": obj["metadata"]},
        }
        for obj in objects
    ]
    head = {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {"resourceVersion": revision}}
    return head | {"columnDefinitions": definitions, "rows": rows}


def _public(column: Object) -> Object:
    return {key: value for key, value in column.items() if key != "jsonPath"}


def _cell(column: Object, obj: Object) -> Any:
    value: Any = obj
    for key, field, wanted in _STEP.findall(column["jsonPath"]):
        if key:
            value = value.get(key) if isinstance(value, dict) else None
        else:
            entries = value if isinstance(value, list) else []
            value = next((entry for entry in entries if entry.get(field) == wanted), None)
    if value is None or column["type"] != "date":
        return value
    return _age((datetime.now(UTC) - datetime.fromisoformat(value)).total_seconds())


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * length:
            return f"{int(seconds // length)}{unit}"
    return f"{int(seconds)}s"
