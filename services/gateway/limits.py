"""Requests per minute, exact over all replicas: buckets in Postgres, of which a replica takes what it needs now.

A busy caller's requests are taken up to a second's worth at once, so that not every call is a round trip; what was not
used within that second goes back with the next taking.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from kit import errors
from services.gateway import store
from services.gateway.store import rows

HELD_SECONDS = 1.0
MOST_AT_ONCE = 1000
_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class Limit:
    """Requests per minute of an account, a key or a principal."""

    whose: str
    subject: str
    per_minute: int


@dataclass(slots=True)
class _Held:
    """What this replica has taken of one bucket."""

    left: int = 0
    taken: int = 0
    at: float = -1e9
    closed_until: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


class Limiter:
    """Counts requests."""

    def __init__(self, limits: store.LimitStore) -> None:
        self._limits = limits
        self._held: dict[str, _Held] = {}

    async def take(self, limits: Iterable[Limit]) -> None:
        """Counts one request in each. Raises ResourceExhausted/RATE_LIMITED, and then it is counted in none."""
        counted: list[_Held] = []
        for limit in limits:
            held = self._of(limit)
            wait_seconds = await self._one(limit, held)
            if wait_seconds > 0:
                for each in counted:
                    each.left += 1
                raise at_limit("requests per minute", limit.whose, limit.per_minute, wait_seconds)
            counted.append(held)

    def _of(self, limit: Limit) -> _Held:
        if len(self._held) >= _REMEMBERED and limit.subject not in self._held:
            self._held.clear()
        return self._held.setdefault(limit.subject, _Held())

    async def _one(self, limit: Limit, held: _Held) -> float:
        """0: counted; else how long to wait."""
        async with held.turn:
            now = time.monotonic()
            if held.closed_until > now:
                return held.closed_until - now
            if held.left > 0 and now - held.at < HELD_SECONDS:
                held.left -= 1
                return 0.0
            busy = held.left == 0 and now - held.at < HELD_SECONDS
            wanted = 2 * held.taken if busy else 1
            wanted = max(1, min(wanted, limit.per_minute // 60, MOST_AT_ONCE))
            granted, wait_seconds = await self._limits.take_requests(
                limit.subject, limit.per_minute, wanted, held.left
            )
            held.at, held.taken, held.left = time.monotonic(), granted, max(0, granted - 1)
            if granted == 0:
                # Asked again within a second, since an operator may have raised the limit.
                held.closed_until = held.at + min(wait_seconds, HELD_SECONDS)
                return wait_seconds
            return 0.0


def at_limit(
    what: str, whose: str, allowed: int, wait_seconds: float, left: int = 0
) -> errors.ResourceExhausted:
    """A limit that counts by time."""
    return errors.ResourceExhausted(
        "RATE_LIMITED",
        f"the {whose} has used its {allowed} {what}; try again in {math.ceil(wait_seconds)} s",
        retry_after_seconds=wait_seconds,
        limit=what.replace(" ", "_"),
        whose=whose,
        allowed=allowed,
        left=left,
    )


def of_admission(found: rows.AtLimit) -> errors.ResourceExhausted:
    """The limit that a request for a video met."""
    allowed = found.allowed
    if found.reason == "RATE_LIMITED":
        return at_limit("videos per hour", found.subject, allowed, found.wait_seconds)
    if found.reason == "MODERATION_LIMIT":
        return errors.ResourceExhausted(
            "MODERATION_LIMIT",
            f"{allowed} of the account's videos were refused by moderation within the {found.subject}, as many as "
            "may be; change the prompts and wait",
            retry_after_seconds=found.wait_seconds,
            limit=f"moderation_refusals_per_{found.subject}",
            whose="account",
            allowed=allowed,
            left=0,
        )
    return errors.ResourceExhausted(
        "TOO_MANY_IN_FLIGHT",
        f"the {found.subject} has {allowed} videos in flight, as many as it may; wait for one to end",
        retry_after_seconds=found.wait_seconds,
        limit="max_in_flight",
        whose=found.subject,
        allowed=allowed,
        left=0,
    )


@dataclass(frozen=True, slots=True)
class Upload:
    """Whose an upload is, and the request that sends it, which costs nothing when it is sent again."""

    account_id: str
    key_id: str
    owner: str


class Uploads:
    """Bytes of uploads per day. What is under way is not counted yet: together they may pass the limit by that much."""

    def __init__(self, limits: store.LimitStore) -> None:
        self._limits = limits

    async def check(self, upload: Upload, size_bytes: int) -> None:
        """Raises ResourceExhausted/RATE_LIMITED where so much more is too much; 0 where the size is not known yet."""
        standing, day_left = await self._limits.uploads(
            upload.account_id, upload.key_id, upload.owner
        )
        for whose, used, allowed in standing:
            if used + max(size_bytes, 1) > allowed:
                left = max(0, allowed - used)
                raise at_limit("upload bytes per day", whose, allowed, day_left, left)

    async def count(self, upload: Upload, size_bytes: int) -> None:
        """Counts what was taken, once."""
        await self._limits.count_upload(upload.account_id, upload.key_id, upload.owner, size_bytes)
