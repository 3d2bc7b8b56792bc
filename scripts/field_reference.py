"""The reference of a kind, from its CRD: a section a block, an anchor a field, a sample with every default."""

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from finetune_api import constants

_SCHEMES = re.compile(r"\b(hf|s3|pvc|file)://")
_NO_CREDENTIALS = "must not hold credentials"
_KUBERNETES = "https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/#scheduling"
#: What many fields have in common is said once: the start of the rule -> its short name, whose section has the rule.
_SHARED = {
    "must be the name of a Kubernetes object": "object name",
    "must be the key of a label": "label key",
    "must be the value of a label": "label value",
    "must be a quantity": "quantity",
}
_EXAMPLES = {
    "spec.model.source": "hf://mistralai/Mistral-7B-v0.3",
    "spec.dataset.train": "s3://data/nli/train_ft.jsonl",
    "spec.output.uri": "s3://adapters/mistral-nli",
}
Node = dict[str, Any]


def page(definition: Node, intro: str, sample: bool = False) -> str:
    """Return the page of the kind that `definition`, a CRD, defines."""
    names, schema = definition["spec"]["names"], definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    parts = schema["properties"]
    lines = [f"# {names['kind']} reference\n", f"`{constants.API_VERSION}`, short name `{names['shortNames'][0]}`.\n"]
    if sample:
        lines += ["## Every default\n", *_sample(names["kind"], parts["spec"])]
    for part, about in (("spec", intro), ("status", "What the operator answers.")):
        lines += [f"## {part}\n\n{about}\n", *_blocks(parts[part], part)]
        if rules := parts[part].get("x-kubernetes-validations", []):
            lines += [f"## Rules over several fields of {part}\n"]
            lines += [*(f"- `{part}{rule['fieldPath']}` {rule['message']}." for rule in rules), ""]
    lines += _shared_rules(parts)
    return "\n".join(lines)


def _blocks(node: Node, path: str) -> Iterator[str]:
    """Yield the fields that are in no block, then a section for each block."""
    fields = node["properties"]
    blocks = {name: child for name, child in fields.items() if _inner(child).get("properties")}
    required = node.get("required", [])
    plain = {name: child for name, child in fields.items() if name not in blocks}
    yield from (_field(name, child, f"{path}.{name}", name in required) for name, child in plain.items())
    yield ""
    for name, child in blocks.items():
        where = f"{path}.{name}"
        told = "One entry for each. " * ("items" in child) + "Required." * (name in required)
        yield f"### {where}\n\n{_meaning(child)} {told}".rstrip() + "\n"
        yield from _fields(_inner(child), where + "[]" * ("items" in child), "")
        yield ""


def _fields(node: Node, path: str, prefix: str) -> Iterator[str]:
    for name, child in node.get("properties", {}).items():
        where, shown = f"{path}.{name}", f"{prefix}{name}"
        yield _field(shown, child, where, name in node.get("required", []))
        if name != "affinity":  # Kubernetes' own
            yield from _fields(
                _inner(child), where + "[]" * ("items" in child), shown + "[]" * ("items" in child) + "."
            )


def _inner(node: Node) -> Node:
    return node.get("items", node)


def _field(name: str, node: Node, where: str, required: bool) -> str:
    anchor = where.replace("[]", "")
    return f'- <a id="{anchor}"></a>**`{name}`** {_told(node, required)}{_meaning(node, where)}'


def _told(node: Node, required: bool) -> str:
    """Return type, bounds and default in parentheses."""
    default = node.get("default")
    shown = "required" if required else f"default `{json.dumps(default)}`" if default not in (None, {}) else ""
    return f"({', '.join(filter(None, [_type(node), _bounds(node), shown]))})<br>\n  "


def _meaning(node: Node, where: str = "") -> str:
    words = [node.get("description", "").replace("\n", " ").replace("<", "&lt;")]
    if where.endswith(".affinity"):
        words.append(f"[Its fields]({_KUBERNETES}) are those of a pod's.")
    elif "properties" not in node:
        words += [f"*{rule[0].upper()}{rule[1:]}.*" for rule in _rules(node) if not _is_shared(rule, node)]
    return " ".join(words)


def _rules(node: Node) -> list[str]:
    return [rule["message"] for rule in node.get("x-kubernetes-validations", [])]


def _is_uri(node: Node) -> bool:
    return any(rule.startswith(_NO_CREDENTIALS) for rule in _rules(node))


def _is_shared(rule: str, node: Node) -> bool:
    return _is_uri(node) or rule.startswith(tuple(_SHARED))


def _type(node: Node) -> str:
    if "enum" in node:
        return " | ".join(f"`{value}`" for value in node["enum"])
    if _is_uri(node):
        schemes = {f"{found}://" for rule in _rules(node) for found in _SCHEMES.findall(rule)}
        return f"[URI](#uris): {', '.join(sorted(schemes))}"
    for start, name in _SHARED.items():
        if any(rule.startswith(start) for rule in _rules(node)):
            return f"[{name}](#{name.replace(' ', '-')}s)".replace("quantitys", "quantities")
    if "x-kubernetes-int-or-string" in node:
        return "integer or string"
    if "x-kubernetes-preserve-unknown-fields" in node:
        return "any"
    kind = node.get("type", "object")
    if kind == "array":
        return f"list of {_type(node['items'])}"
    return "map" if isinstance(node.get("additionalProperties"), dict) else str(kind)


def _bounds(node: Node) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    words = []
    if low is not None:
        words.append(f"{'>' if node.get('exclusiveMinimum') else '≥'} {low}")
    if high is not None and high < 2**31 - 1:
        words.append(f"{'<' if node.get('exclusiveMaximum') else '≤'} {high}")
    return ", ".join(words)


def _walk(node: Node) -> Iterator[Node]:
    for child in (*node.get("properties", {}).values(), *([node["items"]] if "items" in node else [])):
        yield child
        yield from _walk(child)


def _shared_rules(parts: Node) -> list[str]:
    """Return the sections of what many fields have in common."""
    nodes = [node for part in ("spec", "status") for node in _walk(parts[part])]
    sections: list[str] = []
    uris = [node for node in nodes if _is_uri(node)]
    if uris:
        longest = max(uris, key=lambda node: len(_SCHEMES.findall(" ".join(_rules(node)))))
        sections += ["## URIs\n", "Each field says which of the four it takes.\n", *_listed(_rules(longest))]
    for start, name in _SHARED.items():
        found = next((rule for node in nodes for rule in _rules(node) if rule.startswith(start)), None)
        if found:
            plural = "Quantities" if name == "quantity" else f"{name[0].upper()}{name[1:]}s"
            sections += [f"## {plural}\n", *_listed([found])]
    return sections


def _listed(rules: list[str]) -> list[str]:
    return [*(f"- {rule[0].upper()}{rule[1:]}." for rule in rules), ""]


def _sample(kind: str, spec: Node) -> list[str]:
    """Return a whole manifest: defaults as they are, fields without one as comments."""
    lines = ["What is not written is this; a field in a comment has no default.\n", "```yaml"]
    lines += [f"apiVersion: {constants.API_VERSION}", f"kind: {kind}", "metadata:", "  name: mistral-nli", "spec:"]
    return [*lines, *_sample_of(spec, "spec", 1), "```", ""]


def _sample_of(node: Node, path: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for name, child in node["properties"].items():
        where = f"{path}.{name}"
        value = _EXAMPLES.get(where, child.get("default"))
        if child.get("properties") and (value == {} or name in node.get("required", [])):
            yield f"{indent}{name}:"
            yield from _sample_of(child, where, depth + 1)
        elif value is None or value == {}:
            yield f"{indent}# {name}:"
        else:
            written = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
            yield f"{indent}{name}: {written}"
