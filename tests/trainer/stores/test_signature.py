"""A manifest that is signed says what was signed; whoever asks for a signature takes no other."""

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from finetune_api import constants
from finetune_api.manifest import load_file
from finetune_api.spec import Metadata
from finetune_api.uri import parse
from finetune_trainer.publishing.artifacts import ARTIFACTS
from finetune_trainer.publishing.bundle import Bundle
from finetune_trainer.publishing.publish import AdapterOutput
from finetune_trainer.settings import Environment, Ranks, Settings
from finetune_trainer.stores.credentials import Credentials
from finetune_trainer.stores.errors import StoreCorrupted, StoreMisconfigured
from finetune_trainer.stores.open import open_store
from finetune_trainer.stores.signature import require_signature, signing_key
from support.cli.run import finetune, no_traceback
from support.trainer.process import job

KEY, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def private(key: Any) -> str:
    return str(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


def public(key: Any) -> str:
    return str(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def published(folder: Path, key: Any | None) -> Path:
    """An adapter with lineage and metrics, whose key comes from the output's Secret."""
    (folder / "made").mkdir(parents=True)
    (folder / "made" / constants.ADAPTER_CONFIG_FILE).write_text("{}")
    (folder / "made" / constants.ADAPTER_WEIGHTS_FILE).write_bytes(b"weights")
    secret = folder / "secrets/output"
    secret.mkdir(parents=True)
    if key:
        (secret / constants.ENV_SIGNING_KEY).write_text(private(key))
    store = open_store(parse(f"file://{folder}/out"), Credentials("output", {}))
    credentials = Credentials.for_role("output", {}, folder / "secrets")
    bundle = Bundle(folder / "made", ARTIFACTS["Adapter"], "org/base", 8, {"evalLoss": 1 / 3, "accuracy": 1e-7})
    AdapterOutput(store, Metadata(name="nli"), key=signing_key(credentials.values)).publish(bundle)
    return folder / "out"


def check(manifest: Path, env: dict[str, str]) -> None:
    require_signature(manifest.read_bytes(), "here", env)


@pytest.mark.parametrize("as_file", [False, True])
def test_what_was_signed_passes_and_nothing_else(as_file: bool, tmp_path: Path) -> None:
    manifest = published(tmp_path, KEY) / "manifest.json"
    (tmp_path / "key.pem").write_text(public(KEY))
    env = {constants.ENV_PUBLIC_KEY: str(tmp_path / "key.pem") if as_file else public(KEY)}
    check(manifest, env)
    check(manifest, {})
    with pytest.raises(StoreCorrupted, match="here is not signed with the key in FINETUNE_PUBLIC_KEY"):
        check(manifest, {constants.ENV_PUBLIC_KEY: public(OTHER)})
    text = manifest.read_text()
    fields = json.loads(text)
    for changed in (
        json.dumps(fields | {"rank": 9}),
        json.dumps(fields | {"unknown": 1}),
        json.dumps(fields | {"signature": "AAAA"}),
        json.dumps(fields | {"signature": "no base64!"}),
        text.replace('"rank": 8', '"rank": 9, "rank": 8'),
        json.dumps({name: value for name, value in fields.items() if name != "signature"}),
        json.dumps(fields | {"signature": None}),
        "[]",
    ):
        manifest.write_text(changed)
        with pytest.raises(StoreCorrupted):
            check(manifest, env)
    manifest.write_text(json.dumps(dict(reversed(fields.items()))))
    check(manifest, env)  # the same facts in another order


@pytest.mark.parametrize("key", ["no key", private(generate_private_key(SECP256R1())), public(KEY)])
def test_a_signing_key_that_is_none_is_refused_without_a_word_of_it(key: str) -> None:
    with pytest.raises(StoreMisconfigured) as refused:
        signing_key({constants.ENV_SIGNING_KEY: key})
    assert str(refused.value) == (
        "output.secretRef: FINETUNE_SIGNING_KEY is no ed25519 private key in PEM without a password"
    )


def test_a_job_signs_what_it_publishes_with_the_key_of_its_output(tmp_path: Path) -> None:
    published(tmp_path, KEY)
    environment = Environment.from_env({constants.ENV_SECRETS_DIR: str(tmp_path / "secrets")})
    settings = Settings(load_file(job(tmp_path / "job", Path("/models/base"))), environment, Ranks())
    for folder in ("", "merged"):
        output = AdapterOutput.open(settings, folder)
        assert output.key
        assert private(KEY) not in repr(output)
    (tmp_path / "secrets/output" / constants.ENV_SIGNING_KEY).write_text("none")
    with pytest.raises(StoreMisconfigured, match="FINETUNE_SIGNING_KEY is no ed25519 private key"):
        AdapterOutput.open(settings)


@pytest.mark.parametrize("key", ["nowhere.pem", "-----BEGIN nothing", public(generate_private_key(SECP256R1()))])
def test_a_public_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(StoreMisconfigured, match="FINETUNE_PUBLIC_KEY is no ed25519 public key in PEM"):
        require_signature(b"{}", "here", {constants.ENV_PUBLIC_KEY: key})


def test_the_commands_that_read_an_adapter_ask_for_the_signature(tmp_path: Path) -> None:
    signed, plain = published(tmp_path / "signed", KEY), published(tmp_path / "plain", None)
    env = {constants.ENV_PUBLIC_KEY: public(KEY)}
    assert finetune("download", f"file://{signed}", str(tmp_path / "got"), env=env).returncode == 0
    for command in (["download", str(plain), str(tmp_path / "no")], ["chat", str(plain)], ["lineage", str(plain)]):
        refused = no_traceback(finetune(*command, env=env))
        assert refused.returncode == 5
        assert (
            f"file://{plain}/manifest.json is not signed, and FINETUNE_PUBLIC_KEY asks for a signature"
            in refused.stderr
        )
    assert not (tmp_path / "no").exists()
