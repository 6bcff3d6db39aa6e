"""Quotes: a price that a caller may keep to for a while, as a signed word. Pure; the key is the ledger's own."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from dataclasses import dataclass
from datetime import UTC, datetime

from kit import errors

_MAC_BYTES = 16


@dataclass(frozen=True, slots=True)
class Quote:
    """What was promised: the price of this item in this version of the book, until then."""

    price_version: str
    item_fingerprint: str
    credits: int
    expires_at: datetime


def sign(key: bytes, quote: Quote) -> str:
    """The quote's id."""
    fields = [
        quote.price_version,
        quote.item_fingerprint[:32],
        quote.credits,
        int(quote.expires_at.timestamp()),
    ]
    payload = json.dumps(fields, separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(_mac(key, payload) + payload).decode().rstrip("=")


def check(key: bytes, quote_id: str, item_fingerprint: str, now: datetime) -> Quote:
    """The quote that `quote_id` names. Raises FailedPrecondition/QUOTE_NOT_VALID."""
    version, item, credits_, expires = _open(key, quote_id)
    if item != item_fingerprint[:32]:
        raise _not_valid("it is of another item")
    quote = Quote(version, item_fingerprint, credits_, datetime.fromtimestamp(expires, UTC))
    if now >= quote.expires_at:
        raise _not_valid("it has expired")
    return quote


def version(key: bytes, quote_id: str) -> str:
    """The version of the price book that a quote is of, expired or not; "" when it is not one of ours."""
    try:
        return _open(key, quote_id)[0]
    except errors.FailedPrecondition:
        return ""


def _open(key: bytes, quote_id: str) -> tuple[str, str, int, int]:
    try:
        raw = base64.b64decode(quote_id + "=" * (-len(quote_id) % 4), b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _not_valid("it is not one of ours") from None
    mac, payload = raw[:_MAC_BYTES], raw[_MAC_BYTES:]
    if not hmac.compare_digest(mac, _mac(key, payload)):
        raise _not_valid("it is not one of ours")
    return json.loads(payload)


def _mac(key: bytes, payload: bytes) -> bytes:
    return hmac.digest(key, payload, hashlib.sha256)[:_MAC_BYTES]


def _not_valid(why: str) -> errors.FailedPrecondition:
    return errors.FailedPrecondition(
        "QUOTE_NOT_VALID", f"the quote is not valid: {why}; ask for a new one"
    )
