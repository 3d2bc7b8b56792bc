"""The ed25519 signature of a manifest, which holds the digest of every file: of all of it but the signature."""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from finetune_api import constants
from finetune_trainer.stores.errors import StoreCorrupted, StoreMisconfigured

_FIELD: Final = "signature"


class SigningKey:
    """A private key, whose repr shows nothing of it."""

    def __init__(self, key: Any) -> None:
        self._key = key

    def sign(self, data: bytes) -> str:
        """Return the signature of a manifest in base64."""
        return base64.b64encode(self._key.sign(_signed(data))).decode()


def signing_key(values: Mapping[str, str]) -> SigningKey | None:
    """Return the key in FINETUNE_SIGNING_KEY, a PEM text in the output's Secret; None if there is none.

    Raises:
        StoreMisconfigured: It is no ed25519 key.
    """
    if not (text := values.get(constants.ENV_SIGNING_KEY)):
        return None
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(text.encode(), password=None)
    except Exception:  # what the library says may quote the key
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise StoreMisconfigured(
            f"output.secretRef: {constants.ENV_SIGNING_KEY} is no ed25519 private key in PEM without a password"
        )
    return SigningKey(key)


def require_signature(data: bytes, where: str, env: Mapping[str, str]) -> None:
    """Check a manifest's signature against FINETUNE_PUBLIC_KEY, a PEM text or its file; do nothing if that is not set.

    Args:
        data: The manifest's bytes.
        where: Its URI, for messages.
        env: The process's environment.

    Raises:
        StoreMisconfigured: The key cannot be used.
        StoreCorrupted: The manifest is not signed with it.
    """
    if not (given := env.get(constants.ENV_PUBLIC_KEY)):
        return
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        text = given.encode() if "-----BEGIN" in given else Path(given).read_bytes()
        key = load_pem_public_key(text)
    except (OSError, ValueError):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise StoreMisconfigured(f"{constants.ENV_PUBLIC_KEY} is no ed25519 public key in PEM, nor a file with one")
    signature = _parsed(data).get(_FIELD)
    if not isinstance(signature, str):
        raise StoreCorrupted(f"{where} is not signed, and {constants.ENV_PUBLIC_KEY} asks for a signature")
    try:
        key.verify(base64.b64decode(signature, validate=True), _signed(data))
    except (InvalidSignature, binascii.Error):
        raise StoreCorrupted(f"{where} is not signed with the key in {constants.ENV_PUBLIC_KEY}") from None


def _signed(data: bytes) -> bytes:
    """Return what is signed of a manifest: its fields, sorted, without the signature."""
    fields = {name: value for name, value in _parsed(data).items() if name != _FIELD}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        raise StoreCorrupted(f"{constants.MANIFEST_FILE} cannot be read: {error}") from None
    return found if isinstance(found, dict) else {}


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a name that is given twice: readers differ in which of the two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is given twice")
    return found
