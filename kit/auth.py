"""Tokens between services: short-lived, signed, naming who calls."""

from __future__ import annotations

import time
from collections.abc import Collection

import jwt

from kit import errors

TOKEN_SECONDS = 120
_ALGORITHM = "HS256"
_AUDIENCE = "framewire-services"
_LEEWAY_SECONDS = 30
_REMEMBERED = 256


class ServiceTokens:
    """Makes and checks the tokens of one process; a token is reused until half of its life is over."""

    def __init__(self, service: str, secret: str) -> None:
        if len(secret) < 32:
            raise ValueError("service_token_secret needs at least 32 characters")
        self._service = service
        self._secret = secret
        self._token = ""
        self._renew_at = 0.0
        self._checked: dict[str, tuple[str, float]] = {}

    def token(self) -> str:
        """A token that is good for at least a minute."""
        if time.monotonic() >= self._renew_at:
            now = int(time.time())
            claims = {
                "iss": self._service,
                "aud": _AUDIENCE,
                "iat": now,
                "exp": now + TOKEN_SECONDS,
            }
            self._token = jwt.encode(claims, self._secret, algorithm=_ALGORITHM)
            self._renew_at = time.monotonic() + TOKEN_SECONDS / 2
        return self._token

    def headers(self) -> dict[str, str]:
        """The metadata that a call carries."""
        return {"authorization": f"Bearer {self.token()}"}

    def caller(self, authorization: str, allowed: Collection[str]) -> str:
        """The service that calls; Unauthenticated or PermissionDenied when it may not."""
        caller, until = self._checked.get(authorization, ("", 0.0))
        if time.time() >= until:
            caller = self._check(authorization)
        if caller not in allowed:
            raise errors.PermissionDenied("ROLE_NOT_ALLOWED", f"{caller} may not call this service")
        return caller

    def _check(self, authorization: str) -> str:
        """Who a token says calls; remembered for a little, since a caller sends the same one for a minute."""
        if not authorization.startswith("Bearer "):
            raise errors.Unauthenticated("CREDENTIALS_INVALID", "a service token is needed")
        try:
            claims = jwt.decode(
                authorization.removeprefix("Bearer "),
                self._secret,
                algorithms=[_ALGORITHM],
                audience=_AUDIENCE,
                leeway=_LEEWAY_SECONDS,
                options={"require": ["iss", "exp"]},
            )
        except jwt.InvalidTokenError as error:
            raise errors.Unauthenticated(
                "CREDENTIALS_INVALID", f"the service token is not valid: {error}"
            ) from error
        if len(self._checked) >= _REMEMBERED:
            self._checked.clear()
        caller = str(claims["iss"])
        self._checked[authorization] = (caller, float(claims["exp"]) + _LEEWAY_SECONDS)
        return caller
