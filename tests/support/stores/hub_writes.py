"""What the small hub does for those who write: the endpoints that huggingface_hub's client uploads by."""

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from support.stores.hub import Hub


def answer(hub: "Hub", method: str, path: str, token: str, body: bytes) -> tuple[int, Any]:
    """Return status and JSON for a request that writes; the commit is atomic, as the real hub's."""
    if not hub.writer or token != hub.writer:
        return (403 if token else 401), {"error": "may not write"}
    if upload := re.fullmatch(r"lfs/([0-9a-f]{64})", path):
        if hashlib.sha256(body).hexdigest() != upload[1]:
            return 400, {"error": "other bytes"}
        hub.objects[upload[1]] = body
        return 200, {}
    if path == "api/validate-yaml":
        return 200, {"errors": [], "warnings": []}
    if path == "api/repos/create":
        return _create(hub, json.loads(body))
    if name := re.fullmatch(r"(.+)\.git/info/lfs/objects/batch", path):
        objects = json.loads(body)["objects"]
        actions = [
            each | {"actions": {"upload": {"href": f"{hub.endpoint}/lfs/{each['oid']}"}}}
            for each in objects
            if each["oid"] not in hub.objects
        ]
        return 200, {"transfer": "basic", "objects": actions or [dict(each) for each in objects]}
    if name := re.fullmatch(r"api/models/(.+)/preupload/main", path):
        files = json.loads(body)["files"]
        modes = {each["path"]: "lfs" if each["path"].endswith(".safetensors") else "regular" for each in files}
        told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        return 200, {"files": told}
    if name := re.fullmatch(r"api/models/(.+)/commit/main", path):
        return _commit(hub, name[1], [json.loads(line) for line in body.splitlines() if line])
    if re.fullmatch(r"api/models/(.+)/auth-check/write", path):
        return 200, {}
    return 404, {"error": f"{method} {path}"}


def _create(hub: "Hub", asked: dict[str, Any]) -> tuple[int, Any]:
    name = f"{asked.get('organization') or 'me'}/{asked['name']}"
    if name in hub.repositories:
        return 409, {"error": "exists", "url": f"{hub.endpoint}/{name}"}
    assert hub.folder is not None
    folder = hub.folder / name
    folder.mkdir(parents=True)
    hub.add(name, folder, token=hub.writer if asked.get("private") or asked.get("visibility") == "private" else None)
    return 200, {"url": f"{hub.endpoint}/{name}"}


def _commit(hub: "Hub", name: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
    if name not in hub.repositories:
        return 404, {"error": "no such repository"}
    repository = hub.repositories[name]
    made: dict[str, bytes | None] = {}
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            made[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in hub.objects:
                return 422, {"error": "an LFS file that was not uploaded"}
            made[value["path"]] = hub.objects[value["oid"]]
        elif line["key"] == "deletedFile":
            made[value["path"]] = None
    for path, data in made.items():
        _put(repository.folder / path, data)
    hub.commits.append((lines[0]["value"]["summary"], sorted(made)))
    oid = repository.commit
    return 200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True}


def _put(file: Path, data: bytes | None) -> None:
    if data is None:
        file.unlink()
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial")
    partial.write_bytes(data)
    shutil.move(partial, file)
