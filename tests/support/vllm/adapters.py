"""Adapters that a vLLM server is asked for."""

import hashlib
import json
from pathlib import Path
from typing import Any

from finetune_trainer.stores.signature import SigningKey

BASE, COMMIT = "mistralai/Mistral-7B-v0.3", "c" * 40


def put(folder: Path, text: str = "one", key: SigningKey | None = None, **changes: Any) -> str:
    """Publish an adapter; returns its manifest's digest."""
    files = {"adapter_config.json": b"{}", "adapter_model.safetensors": text.encode(), "training/job.yaml": b"a: 1\n"}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    records = [
        {"path": name, "sizeBytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    ]
    body = {"schemaVersion": 1, "kind": "Adapter", "createdAt": "2026-01-01T00:00:00Z", "files": records}
    body |= {"baseModel": BASE, "baseCommit": COMMIT, "rank": 8} | changes
    if key:
        body["signature"] = key.sign(json.dumps(body).encode())
    (folder / "manifest.json").write_text(json.dumps(body))
    return hashlib.sha256(json.dumps(body).encode()).hexdigest()
