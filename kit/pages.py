"""Page tokens of listings that go from newest to oldest by (created_at, id): opaque, stable under inserts."""

from __future__ import annotations

import base64
import binascii
from datetime import datetime

from kit import errors

DEFAULT_SIZE = 50


def encode(created_at: object, row_id: str) -> str:
    """The token of the page that begins after this row."""
    assert isinstance(created_at, datetime)
    text = f"{created_at.isoformat()}|{row_id}"
    return base64.urlsafe_b64encode(text.encode()).decode()


def decode(token: str) -> tuple[datetime, str] | None:
    """Where a page begins; None for the first. Raises InvalidArgument/PAGE_TOKEN_INVALID."""
    if not token:
        return None
    try:
        moment, _, row_id = base64.urlsafe_b64decode(token.encode()).decode().partition("|")
        return datetime.fromisoformat(moment), row_id
    except (ValueError, binascii.Error):
        raise errors.InvalidArgument(
            "PAGE_TOKEN_INVALID", "page_token is not one that this listing gave; start without it"
        ) from None
