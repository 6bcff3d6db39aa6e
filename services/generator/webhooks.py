"""Providers' webhooks as Standard Webhooks signs them: who may hint, and at what. Pure: no I/O, no clock.

Signed is `{webhook-id}.{webhook-timestamp}.{body}` with HMAC-SHA256; `webhook-signature` holds one or more
`v1,<base64>`, of which one must be right, under one of the account's secrets: two of them let a secret be changed
without a gap.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence

WINDOW_SECONDS = 300
MAX_ID_CHARS = 256
MAX_SIGNATURES = 16
MIN_SECRET_BYTES = 16
_NOBODYS = (b"no account has this secret, yet to check it takes as long",)


class SecretsError(ValueError):
    """The setting cannot be used."""


def secrets(text: str) -> dict[str, tuple[bytes, ...]]:
    """Keys by provider account, from `main:whsec_...,other:...`. Raises SecretsError, without the secret."""
    found: dict[str, tuple[bytes, ...]] = {}
    for number, entry in enumerate(filter(None, (part.strip() for part in text.split(","))), 1):
        account, colon, secret = entry.partition(":")
        if not colon or not account:
            raise SecretsError(f"webhook secret {number}: want ACCOUNT:SECRET")
        found[account] = (*found.get(account, ()), _key(secret, number))
    return found


def _key(secret: str, number: int) -> bytes:
    key = secret.encode()
    if secret.startswith("whsec_"):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise SecretsError(f"webhook secret {number}: not base64 after whsec_") from None
    if len(key) < MIN_SECRET_BYTES:
        raise SecretsError(f"webhook secret {number}: shorter than {MIN_SECRET_BYTES} bytes")
    return key


def signed_by_us(
    keys: Sequence[bytes] | None, headers: Mapping[str, str], body: bytes, now: float
) -> bool:
    """Whether one of the signatures is of one of the keys, and of now. Of unknown accounts never, and no sooner."""
    message_id, timestamp = headers.get("webhook-id", ""), headers.get("webhook-timestamp", "")
    given = headers.get("webhook-signature", "").split(" ")[:MAX_SIGNATURES]
    in_time = (
        timestamp.isascii()
        and timestamp.isdecimal()
        and len(timestamp) < 12
        and abs(now - int(timestamp)) <= WINDOW_SECONDS
    )
    named = 0 < len(message_id) <= MAX_ID_CHARS and message_id.isprintable()
    content = f"{message_id}.{timestamp}.".encode() + body
    right = False
    for key in keys or _NOBODYS:
        digest = hmac.new(key, content, hashlib.sha256).digest()
        wanted = b"v1," + base64.b64encode(digest)
        for signature in given:
            right |= hmac.compare_digest(signature.encode(), wanted)
    return bool(keys) and right and in_time and named


def job_of(body: bytes) -> str | None:
    """The provider's job that it is about; None for what is about none."""
    try:
        event = json.loads(body)
        job_id = event["data"]["id"]
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    usable = isinstance(job_id, str) and 0 < len(job_id) <= 2048 and job_id.isprintable()
    return job_id if usable else None
