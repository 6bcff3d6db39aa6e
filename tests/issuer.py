"""An OpenID Connect issuer for tests: keys of its own, tokens of every kind, and a JWKS over HTTP that can fail."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from services.local import places

AUDIENCE = "framewire-client-id"
DOMAIN = "example.com"


class Issuer:
    """Serves its public keys; `answer` takes their place where a test wants another answer."""

    def __init__(self) -> None:
        self._port = places.free_port("issuer")
        self._keys: dict[str, rsa.RSAPrivateKey] = {}
        self._server: asyncio.Server | None = None
        self.answer: bytes | None = None
        self.fetched = 0
        self.rotate("first")

    @property
    def url(self) -> str:
        """What its tokens say as `iss`."""
        return f"http://{places.HOST}:{self._port}"

    def configured(self, **more: Any) -> dict[str, Any]:
        """How a gateway is told of it."""
        return {
            "issuer": self.url,
            "aliases": ["alias.example.com"],
            "audience": [AUDIENCE, "another-client"],
            "jwks_url": f"{self.url}/jwks",
            "hosted_domains": [DOMAIN],
            "keys_seconds": 1,
            "retry_seconds": 0.1,
            **more,
        }

    def rotate(self, kid: str) -> None:
        """Signs by a new key from now on; the old ones are no longer published."""
        self._keys = {kid: rsa.generate_private_key(public_exponent=65537, key_size=2048)}

    def token(self, subject: str = "ann", *, kid: str = "", **claims: Any) -> str:
        """A good token, unless the claims make it another one; a claim of None is left out."""
        name, key = next(iter(self._keys.items()))
        said = self.claims(subject, **claims)
        return jwt.encode(said, key, algorithm="RS256", headers={"kid": kid or name})

    def claims(self, subject: str, **more: Any) -> dict[str, Any]:
        """As Google's tokens say it."""
        now = int(time.time())
        said = {
            "iss": self.url,
            "aud": AUDIENCE,
            "azp": AUDIENCE,
            "sub": subject,
            "email": f"{subject}@{DOMAIN}",
            "email_verified": True,
            "hd": DOMAIN,
            "iat": now,
            "exp": now + 3600,
            **more,
        }
        return {name: value for name, value in said.items() if value is not None}

    def unsigned(self, subject: str = "ann") -> str:
        """`alg: none`."""
        return _put_together({"alg": "none", "typ": "JWT"}, self.claims(subject), b"")

    def by_public_key(self, subject: str = "ann") -> str:
        """HS256, with the public key as the secret."""
        name, key = next(iter(self._keys.items()))
        public = key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        head = {"alg": "HS256", "typ": "JWT", "kid": name}
        signed = _put_together(head, self.claims(subject), b"").rpartition(".")[0]
        return f"{signed}.{_text(hmac.digest(public, signed.encode(), hashlib.sha256))}"

    def jwks(self) -> bytes:
        """The public keys."""
        algorithm = jwt.algorithms.RSAAlgorithm
        keys = [
            {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig"}
            for kid, key in self._keys.items()
        ]
        return json.dumps({"keys": keys}).encode()

    async def start(self) -> None:
        """Listens."""
        self._server = await asyncio.start_server(self._serve, places.HOST, self._port)

    async def stop(self) -> None:
        """Listens no more. Idempotent."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.fetched += 1
        body = self.jwks() if self.answer is None else self.answer
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        writer.close()


def tampered(token: str, **claims: Any) -> str:
    """Another payload under the same signature."""
    head, payload, signature = token.split(".")
    said = json.loads(base64.urlsafe_b64decode(payload + "=="))
    return f"{head}.{_text(json.dumps({**said, **claims}).encode())}.{signature}"


def _put_together(head: dict[str, Any], said: dict[str, Any], signature: bytes) -> str:
    parts = [json.dumps(head).encode(), json.dumps(said).encode(), signature]
    return ".".join(_text(part) for part in parts)


def _text(part: bytes) -> str:
    return base64.urlsafe_b64encode(part).rstrip(b"=").decode()
