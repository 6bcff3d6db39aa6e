"""Identifiers: 26 characters a-z and 0-9, safe in URLs, bus subjects and object keys."""

from __future__ import annotations

import hashlib
import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u


_PAIRS = [first + second for first in _ALPHABET for second in _ALPHABET]


def _encode(number: int) -> str:
    return "".join([_PAIRS[(number >> shift) & 1023] for shift in range(120, -1, -10)])


def new_id() -> str:
    """A fresh id: 48 bits of milliseconds, so that ids sort by age, and 80 bits that nobody can guess."""
    return _encode((time.time_ns() // 1_000_000 << 80) | secrets.randbits(80))


def derived_id(*parts: object) -> str:
    """The id that these parts always have: the same thing made twice is one thing. 128 bits of SHA-256."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return _encode(int.from_bytes(digest[:16], "big"))
