"""A registry's server for tokens, and the certificates of a private authority."""

import base64
import datetime
import ipaddress
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

SERVICE, ISSUER = "registry.test", "tokens.test"


@dataclass
class Authority:
    """A private certificate authority of one certificate, which is also the server's: for 127.0.0.1."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def new(cls) -> "Authority":
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "private authority")])
        now = datetime.datetime.now(datetime.UTC)
        address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([address]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        )
        return cls(key, made.sign(key, hashes.SHA256()))

    def write(self, folder: Path) -> tuple[Path, Path]:
        """The certificate's and the key's file."""
        plain = serialization.NoEncryption()
        form = serialization.PrivateFormat.PKCS8
        (folder / "ca.crt").write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))
        (folder / "ca.key").write_bytes(self.key.private_bytes(serialization.Encoding.PEM, form, plain))
        return folder / "ca.crt", folder / "ca.key"

    def token(self, access: list[dict[str, Any]], seconds: float) -> str:
        """A token as Docker's registry reads them."""
        der = self.certificate.public_bytes(serialization.Encoding.DER)
        head = {"typ": "JWT", "alg": "ES256", "x5c": [base64.b64encode(der).decode()]}
        now = int(time.time())
        body = {"iss": ISSUER, "aud": SERVICE, "sub": "", "iat": now, "nbf": now - 5, "exp": now + int(seconds)}
        signed = ".".join(
            _url64(json.dumps(part).encode()) for part in (head, body | {"jti": uuid.uuid4().hex, "access": access})
        )
        r, s = utils.decode_dss_signature(self.key.sign(signed.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signed}.{_url64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@dataclass
class Tokens:
    """A running server for tokens.

    Attributes:
        address: host:port.
        authority: Signs them.
        login: What it expects for Authorization.
        uses: How often a token may be used, as far as a stand-in registry asks.
        asked: The query and Authorization of each request.
        used: How often each token was.
    """

    address: str
    authority: Authority
    login: str
    uses: int = 1_000
    asked: list[tuple[dict[str, list[str]], str | None]] = field(default_factory=list)
    used: Counter[str] = field(default_factory=Counter)

    @property
    def challenge(self) -> str:
        return f'Bearer realm="http://{self.address}/token",service="{SERVICE}",scope="repository:team/nli:pull,push"'

    def accept(self, authorization: str | None) -> bool:
        """Whether a request may be answered."""
        token = (authorization or "").removeprefix("Bearer ")
        self.used[token] += 1
        return token.count(".") == 2 and self.used[token] <= self.uses


@contextmanager
def token_server(login: str, authority: Authority) -> Iterator[Tokens]:
    """A server on another port of 127.0.0.1, which gives tokens to whoever has `login`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            found.asked.append((query, self.headers.get("Authorization")))
            access = []
            for scope in query.get("scope", []):
                kind, name, actions = scope.split(":")
                access.append({"type": kind, "name": name, "actions": actions.split(",")})
            body = json.dumps({"token": authority.token(access, 60)}).encode()
            self.send_response(200 if self.headers.get("Authorization") == login else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Tokens(f"127.0.0.1:{server.server_address[1]}", authority, login)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
