"""Page tokens of listings that go from newest to oldest by (created_at, id): opaque, stable under inserts.

`Pages` signs its tokens and binds them to one listing: for whatever reaches a caller. `encode` and `decode` are for
listings between services, whose filters the caller repeats.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
from collections.abc import Sequence
from datetime import datetime

from kit import errors

DEFAULT_SIZE = 50
_SIGNATURE_BYTES = 16


class Pages:
    """Makes and reads tokens that are good for the listing that gave them only."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def token(self, listing: Sequence[object], created_at: datetime, row_id: str) -> str:
        """The token of the page that begins after this row. `listing`: its name, owner and filters."""
        place = json.dumps([created_at.isoformat(), row_id]).encode()
        return base64.urlsafe_b64encode(self._sign(listing, place) + place).decode()

    def place(self, listing: Sequence[object], token: str) -> tuple[datetime, str] | None:
        """Where a page begins; None for the first. Raises InvalidArgument/PAGE_TOKEN_INVALID."""
        if not token:
            return None
        try:
            raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise _invalid() from None
        signature, place = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(listing, place)):
            raise _invalid()
        created_at, row_id = json.loads(place)
        return datetime.fromisoformat(created_at), row_id

    def _sign(self, listing: Sequence[object], place: bytes) -> bytes:
        named = json.dumps([str(part) for part in listing]).encode()
        return hmac.digest(self._secret, named + place, hashlib.sha256)[:_SIGNATURE_BYTES]


def encode(created_at: object, row_id: str) -> str:
    """The unsigned token of the page that begins after this row."""
    assert isinstance(created_at, datetime)
    text = f"{created_at.isoformat()}|{row_id}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def decode(token: str) -> tuple[datetime, str] | None:
    """Where an unsigned token's page begins; None for the first. Raises InvalidArgument/PAGE_TOKEN_INVALID."""
    if not token:
        return None
    try:
        moment, _, row_id = base64.urlsafe_b64decode(token.encode()).decode().partition("|")
        return datetime.fromisoformat(moment), row_id
    except (ValueError, binascii.Error):
        raise _invalid() from None


def _invalid() -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "PAGE_TOKEN_INVALID", "page_token is not one that this listing gave; start without it"
    )
