"""manifest.json can be read again, whatever it says."""

from datetime import UTC, datetime

from finetune_api.artifact_manifest import FileRecord, StoreManifest

NO_NUMBERS = {"nan": float("nan"), "infinite": float("inf"), "negative": float("-inf")}


def test_a_manifest_with_such_numbers_is_readable() -> None:
    manifest = StoreManifest(
        kind="Adapter",
        created_at=datetime.now(UTC),
        files=[FileRecord(path="a", size_bytes=1, sha256="0" * 64)],
        metrics={"evalLoss": 0.5} | NO_NUMBERS,
    )
    assert StoreManifest.model_validate_json(manifest.to_bytes()).metrics == {"evalLoss": 0.5}
    written_before = manifest.to_bytes().replace(b": 0.5", b": null")
    assert StoreManifest.model_validate_json(written_before).metrics == {}
