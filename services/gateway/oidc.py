"""Tokens of OpenID Connect issuers: signed by keys that the issuer publishes, and checked here without asking it.

Keys are fetched by a thread with the standard library: one small GET in ten minutes wants no HTTP client of its own.
"""

from __future__ import annotations

import asyncio
import json
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal

import jwt
import pydantic

from kit import errors, telemetry

log = telemetry.logger(__name__)

FETCH_SECONDS = 5.0
MOST_BYTES = 256 * 1024
MOST_TOKEN_CHARACTERS = 6000
"""Below what gRPC takes as metadata without a word of ours."""
_NEEDED = ("iss", "sub", "aud", "exp", "iat")


class Issuer(pydantic.BaseModel):
    """An issuer as configured: whose tokens are taken, and which of them."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    issuer: str = pydantic.Field(min_length=1, max_length=200)
    """What tokens say as `iss`."""
    aliases: tuple[str, ...] = ()
    """What they may say instead (Google: "accounts.google.com")."""
    audience: tuple[str, ...] = pydantic.Field(min_length=1)
    """One of these must be in `aud`: our client ids at the issuer."""
    jwks_url: str
    """Where its keys are; https, or http on this machine."""
    algorithms: tuple[
        Literal["RS256", "RS384", "RS512", "PS256", "ES256", "ES384", "EdDSA"], ...
    ] = (
        "RS256",
        "ES256",
    )
    """How tokens may be signed: only by keys of which we have the public half."""
    hosted_domains: tuple[str, ...] = ()
    """Google's `hd` must be one of these; empty: it is not looked at."""
    clock_skew_seconds: float = pydantic.Field(default=30, ge=0, le=300)
    """How far the issuer's clock may be from ours."""
    keys_seconds: float = pydantic.Field(default=600, gt=0)
    """How old keys get before they are fetched again."""
    retry_seconds: float = pydantic.Field(default=10, gt=0)
    """Least time between two fetches, also where a token names a key that is not known."""

    @pydantic.field_validator("jwks_url")
    @classmethod
    def _safe(cls, url: str) -> str:
        parts = urllib.parse.urlsplit(url)
        local = parts.hostname in ("127.0.0.1", "::1", "localhost")
        if not parts.hostname or not (
            parts.scheme == "https" or (parts.scheme == "http" and local)
        ):
            raise ValueError("must be an https URL")
        return url


@dataclass(frozen=True, slots=True)
class Claims:
    """What a good token says."""

    issuer: str
    subject: str
    email: str
    """Empty unless the issuer says that it is verified."""
    expires_at: float


class Verifier:
    """Checks tokens of the issuers that are configured."""

    def __init__(self, issuers: tuple[Issuer, ...]) -> None:
        self._known: dict[str, tuple[Issuer, _Keys]] = {}
        for issuer in issuers:
            keys = _Keys(issuer)
            for name in (issuer.issuer, *issuer.aliases):
                if name in self._known:
                    raise ValueError(f"GATEWAY_OIDC_ISSUERS names {name} twice")
                self._known[name] = (issuer, keys)

    def issuers(self) -> frozenset[str]:
        """Whose tokens are taken."""
        return frozenset(issuer.issuer for issuer, _ in self._known.values())

    async def verify(self, token: str) -> Claims:
        """Raises Unauthenticated; Unavailable where the issuer's keys were never to be had."""
        if len(token) > MOST_TOKEN_CHARACTERS:
            raise _invalid("it is too long")
        try:
            header = jwt.get_unverified_header(token)
            said = jwt.decode(token, options={"verify_signature": False})
        except jwt.InvalidTokenError:
            raise _invalid("it cannot be read") from None
        found = self._known.get(str(said.get("iss")))
        if found is None:
            raise _invalid("its issuer is not one of ours")
        issuer, keys = found
        if header.get("alg") not in issuer.algorithms:
            raise _invalid("it is not signed as its issuer signs")
        key = await keys.get(str(header.get("kid", "")))
        if key is None:
            raise _invalid("its issuer has no such key")
        return _claims(_checked(token, key, issuer), issuer)


def _checked(token: str, key: jwt.PyJWK, issuer: Issuer) -> dict[str, Any]:
    try:
        return jwt.decode(
            token,
            key,
            algorithms=list(issuer.algorithms),
            audience=list(issuer.audience),
            issuer=[issuer.issuer, *issuer.aliases],
            leeway=issuer.clock_skew_seconds,
            options={"require": list(_NEEDED)},
        )
    except jwt.ExpiredSignatureError:
        raise _invalid("it has expired; get a new one") from None
    except jwt.InvalidAudienceError:
        raise _invalid("it was made for another audience") from None
    except (jwt.PyJWTError, ValueError, TypeError) as error:
        raise _invalid(str(error)) from None


def _claims(said: dict[str, Any], issuer: Issuer) -> Claims:
    subject = said["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= 255 or "\x00" in subject:
        raise _invalid("its subject is not usable")
    if issuer.hosted_domains and said.get("hd") not in issuer.hosted_domains:
        raise _invalid("it is not of a domain that may call")
    email = said.get("email")
    verified = said.get("email_verified") is True and isinstance(email, str) and "\x00" not in email
    return Claims(
        issuer.issuer, subject, str(email).lower() if verified else "", float(said["exp"])
    )


class _Keys:
    """The keys of one issuer; the last good ones are kept while it cannot be reached."""

    def __init__(self, issuer: Issuer) -> None:
        self._issuer = issuer
        self._keys: dict[str, jwt.PyJWK] = {}
        self._good_at = -1e9
        self._tried_at = -1e9
        self._turn = asyncio.Lock()

    async def get(self, kid: str) -> jwt.PyJWK | None:
        """The key of that name; fetches where they are old, or it is new."""
        old = time.monotonic() - self._good_at > self._issuer.keys_seconds
        if kid not in self._keys or (old and not self._turn.locked()):
            await self._refresh(kid)
        if not self._keys:
            raise errors.Unavailable(
                "DEPENDENCY_UNAVAILABLE",
                "the keys of the token's issuer cannot be had; try again",
                retry_after_seconds=self._issuer.retry_seconds,
            )
        return self._keys.get(kid)

    async def _refresh(self, kid: str) -> None:
        async with self._turn:
            now = time.monotonic()
            fresh = now - self._good_at <= self._issuer.keys_seconds
            if (kid in self._keys and fresh) or now - self._tried_at < self._issuer.retry_seconds:
                return
            self._tried_at = now
            try:
                self._keys = await asyncio.to_thread(_fetch, self._issuer.jwks_url)
            except (OSError, ValueError, jwt.PyJWTError) as error:
                log.warning(
                    "issuer_keys_not_fetched", issuer=self._issuer.issuer, error=repr(error)
                )
            else:
                self._good_at = time.monotonic()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """Keys are where the configuration says, nowhere else."""


def _fetch(url: str) -> dict[str, jwt.PyJWK]:
    opener = urllib.request.build_opener(_NoRedirect)
    with opener.open(url, timeout=FETCH_SECONDS) as answer:
        body = answer.read(MOST_BYTES + 1)
    if len(body) > MOST_BYTES:
        raise ValueError("the set of keys is too large")
    found = jwt.PyJWKSet.from_dict(json.loads(body))
    return {key.key_id or "": key for key in found.keys if key.public_key_use in (None, "sig")}


def _invalid(why: str) -> errors.Unauthenticated:
    return errors.Unauthenticated("CREDENTIALS_INVALID", f"the token is not taken: {why}")
