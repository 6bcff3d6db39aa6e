"""Page tokens: opaque, signed, good for the listing that gave them only. Pure."""

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
    """Makes and reads the tokens of listings from newest to oldest by (created_at, id)."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def token(self, listing: Sequence[object], created_at: datetime, row_id: str) -> str:
        """The token of the page that begins after this row."""
        place = json.dumps([*map(str, listing), created_at.isoformat(), row_id]).encode()
        return base64.urlsafe_b64encode(self._sign(place) + place).decode()

    def place(self, listing: Sequence[object], token: str) -> tuple[datetime, str] | None:
        """Where a page begins; None for the first. Raises InvalidArgument/PAGE_TOKEN_INVALID."""
        if not token:
            return None
        try:
            raw = base64.b64decode(token.encode(), altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raise _invalid() from None
        signature, place = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(place)):
            raise _invalid()
        *of, created_at, row_id = json.loads(place)
        if of != [str(part) for part in listing]:
            raise _invalid()
        return datetime.fromisoformat(created_at), row_id

    def _sign(self, place: bytes) -> bytes:
        return hmac.digest(self._secret, place, hashlib.sha256)[:_SIGNATURE_BYTES]


def _invalid() -> errors.InvalidArgument:
    return errors.InvalidArgument(
        "PAGE_TOKEN_INVALID", "page_token is not one that this listing gave; start without it"
    )
