"""A pod's files and environment on this machine: volumes become folders, paths and host names are rewritten to match.

A pod's root is a folder. Each mount is a link in it, at the path it would have in the container; arguments and values
that name such a path are rewritten to it, so that ordinary processes find what they would find in the container.
"""

import base64
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Object = dict[str, Any]
#: find(kind, name) -> the object in the pod's namespace, or None
Find = Callable[[str, str], Object | None]

_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)|\$\$")


class Missing(Exception):
    """Something the pod refers to is not there; the text is the kubelet's."""


def decoded(obj: Object) -> dict[str, bytes]:
    """The entries of a ConfigMap or Secret."""
    if obj["kind"] == "Secret":
        return {key: base64.b64decode(value) for key, value in (obj.get("data") or {}).items()}
    plain = {key: value.encode() for key, value in (obj.get("data") or {}).items()}
    return plain | {key: base64.b64decode(value) for key, value in (obj.get("binaryData") or {}).items()}


def _entries(find: Find, kind: str, name: str, optional: bool) -> dict[str, bytes]:
    found = find(kind, name)
    if found is None:
        if optional:
            return {}
        raise Missing(f'{kind.lower()} "{name}" not found')
    return decoded({"kind": kind} | found)


def field_value(pod: Object, path: str) -> str:
    """A downward API field: metadata.name, metadata.labels['x'], spec.nodeName, status.podIP, …"""
    keyed = re.fullmatch(r"metadata\.(labels|annotations)\['([^']+)'\]", path)
    if keyed:
        return str((pod["metadata"].get(keyed[1]) or {}).get(keyed[2], ""))
    found: Any = pod
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return "" if found is None else str(found)


@dataclass(frozen=True)
class PodFiles:
    """The folders of one pod. `claims` holds one folder per PersistentVolumeClaim of the namespace."""

    pod: Object
    folder: Path
    claims: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def log(self, container: str) -> Path:
        return self.folder / f"{container}.log"

    def prepare(self, find: Find) -> None:
        """Make the volumes and mounts; Missing when a ConfigMap or Secret is not there (yet)."""
        volumes = {v["name"]: self._volume(v, find) for v in self.pod["spec"].get("volumes") or []}
        for container in self.pod["spec"]["containers"]:
            for mount in container.get("volumeMounts") or []:
                if mount["name"] not in volumes:
                    continue
                target = volumes[mount["name"]] / mount.get("subPath", "")
                link = self._inside(mount["mountPath"])
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(target)
            message = self.termination_message(container)
            message.parent.mkdir(parents=True, exist_ok=True)
            message.touch()

    def termination_message(self, container: Object) -> Path:
        return self._inside(container.get("terminationMessagePath") or "/dev/termination-log")

    def remove(self) -> None:
        """Delete the pod's volumes; its logs stay for the test to read."""
        shutil.rmtree(self.root, ignore_errors=True)
        shutil.rmtree(self.folder / "volumes", ignore_errors=True)

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def _volume(self, volume: Object, find: Find) -> Path:
        if "persistentVolumeClaim" in volume:
            folder = self.claims / volume["persistentVolumeClaim"]["claimName"]
            folder.mkdir(parents=True, exist_ok=True)
            return folder
        folder = self.folder / "volumes" / volume["name"]
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self._contents(volume, find).items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return folder

    def _contents(self, volume: Object, find: Find) -> dict[str, bytes]:
        if "emptyDir" in volume:
            return {}
        if "downwardAPI" in volume:
            items = volume["downwardAPI"].get("items") or []
            return {item["path"]: field_value(self.pod, item["fieldRef"]["fieldPath"]).encode() for item in items}
        kind, source, name_key = (
            ("ConfigMap", volume.get("configMap"), "name")
            if "configMap" in volume
            else ("Secret", volume.get("secret"), "secretName")
        )
        if source is None:
            raise ValueError(f"the process node plays no volume of this kind: {sorted(volume)}")
        found = _entries(find, kind, source[name_key], source.get("optional", False))
        if "items" in source:
            return {item["path"]: found[item["key"]] for item in source["items"]}
        return found

    def rewriter(self, address: str, address_of: Callable[[str, str], str]) -> "Rewriter":
        mounts = {m["mountPath"] for c in self.pod["spec"]["containers"] for m in c.get("volumeMounts") or []}
        paths = {c.get("terminationMessagePath") or "/dev/termination-log" for c in self.pod["spec"]["containers"]}
        return Rewriter(self.root, sorted(mounts | paths, key=len, reverse=True), address, self._hosts(address_of))

    def _hosts(self, address_of: Callable[[str, str], str]) -> Callable[[str], str]:
        """Rewrite <host>.<subdomain> (with or without .<namespace>.svc…) of the pod's own headless Service."""
        subdomain = self.pod["spec"].get("subdomain")
        if not subdomain:
            return lambda text: text
        namespace = re.escape(self.pod["metadata"]["namespace"])
        name = re.compile(rf"\b([a-z0-9-]+)\.{re.escape(subdomain)}(\.{namespace}(\.svc(\.cluster\.local)?)?)?\b")
        return lambda text: name.sub(lambda found: address_of(subdomain, found[1]), text)


@dataclass(frozen=True)
class Rewriter:
    """Turns what is true in the container into what is true here."""

    root: Path
    paths: list[str]
    address: str
    hosts: Callable[[str], str]

    def __call__(self, text: str) -> str:
        known = "|".join(re.escape(path.rstrip("/")) for path in self.paths)
        pattern = rf"(?<![\w./-])({known})(?=/|$|[\s:,;\"'])"
        text = re.sub(pattern, lambda found: str(self.root / found[1].strip("/")), text)
        return self.hosts(text).replace("0.0.0.0", self.address)

    def value(self, text: str) -> str:
        """Like a call; besides, a value that is one absolute path always lies in the pod's root."""
        rewritten = self(text)
        is_path = rewritten == text and re.fullmatch(r"/[\w./-]+", text)
        return str(self.root / text.strip("/")) if is_path else rewritten


def expand(text: str, env: Mapping[str, str]) -> str:
    """$(NAME) as Kubernetes expands it: unknown names stay, $$ is a dollar sign."""
    return _REFERENCE.sub(lambda found: "$" if found[0] == "$$" else env.get(found[1], found[0]), text)


def environment(container: Object, pod: Object, find: Find, rewrite: Rewriter) -> dict[str, str]:
    """The container's variables, rewritten; Missing when a ConfigMap or Secret is not there."""
    env: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        kind, key = ("ConfigMap", "configMapRef") if "configMapRef" in source else ("Secret", "secretRef")
        found = _entries(find, kind, source[key]["name"], source[key].get("optional", False))
        env |= {source.get("prefix", "") + name: value.decode() for name, value in found.items()}
    for entry in container.get("env") or []:
        value = _value(entry, pod, find)
        if value is not None:
            env[entry["name"]] = rewrite.value(expand(value, env))
    return env


def _value(entry: Object, pod: Object, find: Find) -> str | None:
    source = entry.get("valueFrom")
    if not source:
        return str(entry.get("value", ""))
    if "fieldRef" in source:
        return field_value(pod, source["fieldRef"]["fieldPath"])
    kind, key = ("ConfigMap", "configMapKeyRef") if "configMapKeyRef" in source else ("Secret", "secretKeyRef")
    reference = source[key]
    found = _entries(find, kind, reference["name"], reference.get("optional", False))
    if reference["key"] in found:
        return found[reference["key"]].decode()
    if reference.get("optional"):
        return None
    namespace = pod["metadata"]["namespace"]
    raise Missing(f"couldn't find key {reference['key']} in {kind} {namespace}/{reference['name']}")


def references(pod: Object) -> set[tuple[str, str]]:
    """Kind and name of every ConfigMap and Secret that volumes and variables refer to."""
    found: set[tuple[str, str]] = set()
    for volume in pod["spec"].get("volumes") or []:
        if "configMap" in volume:
            found.add(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            found.add(("Secret", volume["secret"]["secretName"]))
    for container in pod["spec"]["containers"]:
        sources: list[Any] = [entry.get("valueFrom") or {} for entry in container.get("env") or []]
        for source in [*sources, *(container.get("envFrom") or [])]:
            for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if key in source:
                    found.add((kind, source[key]["name"]))
            for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if key in source:
                    found.add((kind, source[key]["name"]))
    return found
