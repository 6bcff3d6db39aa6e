"""Webhooks: signatures, pauses between tries, and what an answer means. Pure: no I/O, no clock.

Signed as Standard Webhooks has it: HMAC-SHA256 over `{webhook-id}.{webhook-timestamp}.{body}`, base64 after `v1,`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

SECRET_PREFIX = "whsec_"  # noqa: S105 - what every secret begins with, no secret
SECRET_BYTES = 32
MOST_ENDPOINTS = 10
KEPT_TRIES = 20
MAX_ERROR_CHARS = 200
MAX_RETRY_AFTER_SECONDS = 6 * 3600
LEAST_FAILURES = 5
"""So many tries in a row must have failed, beside the time, before an endpoint is disabled for it."""
JITTER = 0.2
_STEPS = (1, 6, 24, 120, 360, 720, 1440, 2880)
_GONE = 410


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A row of `webhook_endpoints`, but for what nobody reads."""

    endpoint_id: str
    account_id: str
    url: str
    description: str
    kinds: Sequence[str]
    secret: bytes
    secret_number: int
    old_secret: bytes | None
    old_secret_until: datetime | None
    disabled_why: str
    disabled_at: datetime | None
    failing_since: datetime | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Event:
    """What is told."""

    event_id: str
    account_id: str
    video_id: str
    kind: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Delivery:
    """A row of `webhook_deliveries`, with what it is about."""

    delivery_id: str
    endpoint_id: str
    event_id: str
    kind: str
    video_id: str
    state: str
    attempts: int
    tries: Sequence[Mapping[str, Any]]
    next_attempt_at: datetime
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Taken:
    """A delivery that this process sends now, under an epoch: its result counts only while that is the row's."""

    delivery_id: str
    epoch: int
    attempts: int
    endpoint_id: str
    url: str
    secrets: Sequence[bytes]
    event_id: str
    headers: Mapping[str, str]
    body: bytes
    now: datetime


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one try. Status 0: no answer."""

    status: int
    duration_ms: int
    error: str = ""
    retry_after_seconds: float = 0

    @property
    def good(self) -> bool:
        """Whether the event was taken."""
        return 200 <= self.status < 300

    @property
    def gone(self) -> bool:
        """Whether the endpoint wants no more."""
        return self.status == _GONE


def shown(secret: bytes) -> str:
    """A secret as its owner gets it."""
    return SECRET_PREFIX + base64.b64encode(secret).decode()


def headers(taken: Taken) -> dict[str, str]:
    """All headers of a delivery but those of the connection."""
    timestamp = str(int(taken.now.timestamp()))
    content = f"{taken.event_id}.{timestamp}.".encode() + taken.body
    told = {name.lower(): value for name, value in taken.headers.items()}
    return {
        **{name: value for name, value in told.items() if name.startswith("ce-")},
        "content-type": "application/json",
        "user-agent": "framewire-webhooks",
        "webhook-id": taken.event_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": " ".join(_signature(secret, content) for secret in taken.secrets),
    }


def _signature(secret: bytes, content: bytes) -> str:
    return "v1," + base64.b64encode(hmac.digest(secret, content, hashlib.sha256)).decode()


def pause(first_seconds: float, attempts: int, answer: Answer, luck: float) -> float:
    """Seconds until the next try, after so many: about 5 s, 30 s, 2 min, 10 min, 30 min, 1 h, 2 h, then 4 h.

    `luck` is between 0 and 1. What the endpoint asks for counts when it is longer, up to a bound.
    """
    step = _STEPS[min(attempts, len(_STEPS)) - 1] * first_seconds
    jittered = step * (1 - JITTER + 2 * JITTER * luck)
    return max(jittered, min(answer.retry_after_seconds, MAX_RETRY_AFTER_SECONDS))


def wants(kinds: Sequence[str], kind: str) -> bool:
    """Whether an endpoint with this filter takes the kind."""
    return not kinds or kind in kinds
