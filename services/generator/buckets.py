"""A provider account's request bucket: the arithmetic, without any I/O or clock. Moments are seconds, of one clock.

GCRA: a bucket is a theoretical arrival time, no counter that a crash could leave wrong. On top of it each use has a
floor: while it gets less than its share, its next request goes before those of the others. What a use leaves over is
the others', in the order of `Use`; but while the last submits that there are wait, they go before downloads: what is
finished is fetched while they are rendered, else nothing were left to do meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

NEVER = float("-inf")
SMALLEST_RATE_SHARE = 0.1
SLOWED_BY = 0.85
JITTER_SECONDS = 0.1
JITTER_SHARE = 0.01
FEW_REQUESTS = 10


class Use(IntEnum):
    """What a request is for; who comes first where nobody is owed anything."""

    DOWNLOAD = 0
    """A finished video: paid already, and it expires."""
    SUBMIT = 1
    POLL = 2
    RETRY = 3
    """A download that failed again and again: no floor, and after all others."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast requests may follow each other, so that no window of the provider sees more than its limit."""

    interval: float
    burst: int


def pace(limit: float, window: float) -> Pace:
    """The pace for `limit` requests in each `window` seconds, sliding or fixed.

    Within one window at most `window / interval + burst` requests leave here, and a little more arrive there since
    some travel faster than others: both are taken off, else the last of each full window would be a 429.
    """
    burst = 2 if limit >= FEW_REQUESTS else 1
    jitter = JITTER_SHARE * window + JITTER_SECONDS
    return Pace((window + jitter) / (limit - burst + 1), burst)


@dataclass(frozen=True, slots=True)
class Bucket:
    """One account's bucket as it stands."""

    tat: float = NEVER
    """Theoretical arrival time of the next request."""
    creates_tat: float = NEVER
    held_until: float = NEVER
    """No request before: the provider's word."""
    rate_share: float = 1.0
    """Of the configured rate, what the provider takes, as of `rate_share_at`; grows back from there."""
    rate_share_at: float = NEVER
    owed_at: Mapping[Use, float] = field(default_factory=dict[Use, float])
    """By use: from when on its next request is one of its floor."""
    waits_until: Mapping[Use, float] = field(default_factory=dict[Use, float])
    """By use: until when somebody can be taken to wait for a request of it."""
    submits_first_until: float = NEVER
    """Until when somebody can be taken to wait with one of the last submits."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What the account allows."""

    requests: Pace
    creates: Pace | None
    floors: Mapping[Use, float]
    """By use, the share of the requests that it gets at the least."""
    recovery_seconds: float = 300.0
    """How long the rate takes to grow back from nothing, after a refusal."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What becomes of one who asks for a request."""

    wait_seconds: float
    """0: it may be made. Else when to ask again."""
    bucket: Bucket


def share_now(bucket: Bucket, quota: Quota, now: float) -> float:
    """What of the configured rate is used now."""
    grown = max(0.0, now - bucket.rate_share_at) / quota.recovery_seconds
    return min(1.0, bucket.rate_share + grown)


def take(bucket: Bucket, quota: Quota, use: Use, now: float, *, last: bool = False) -> Answer:
    """Takes one request if it is there and nobody who comes first waits for it. `last`: one of the last submits."""
    interval = quota.requests.interval / share_now(bucket, quota, now)
    wait = max(bucket.tat - (quota.requests.burst - 1) * interval, bucket.held_until) - now
    own = NEVER
    if use is Use.SUBMIT and quota.creates is not None:
        own = bucket.creates_tat - (quota.creates.burst - 1) * quota.creates.interval - now
    if own > max(0.0, wait):
        # Its own limit keeps it: whoever else comes need not wait for it.
        return Answer(own, bucket)
    if last and bucket.submits_first_until < now:
        bucket = replace(bucket, submits_first_until=now)
    if wait <= 0 and _someone_first(bucket, quota, use, now):
        wait = interval
    if wait > 0:
        until, first_until = now + wait + interval, bucket.submits_first_until
        if bucket.waits_until.get(use, NEVER) >= now + wait <= (first_until if last else until):
            return Answer(wait, bucket)
        return Answer(
            wait,
            replace(
                bucket,
                waits_until={**bucket.waits_until, use: until},
                submits_first_until=until if last else first_until,
            ),
        )
    owed_at = dict(bucket.owed_at)
    if floor := quota.floors.get(use, 0.0):
        # What was not asked for is not saved up, but for one request.
        step = interval / floor
        owed_at[use] = max(owed_at.get(use, NEVER), now - step) + step
    taken = replace(
        bucket,
        tat=max(bucket.tat, now) + interval,
        owed_at=owed_at,
        waits_until={**bucket.waits_until, use: NEVER},
    )
    if use is Use.SUBMIT and quota.creates is not None:
        creates_tat = max(bucket.creates_tat, now) + quota.creates.interval
        taken = replace(taken, creates_tat=creates_tat)
    return Answer(0.0, taken)


def _someone_first(bucket: Bucket, quota: Quota, use: Use, now: float) -> bool:
    mine = _rank(bucket, quota, use, now)
    return any(
        bucket.waits_until.get(other, NEVER) > now and _rank(bucket, quota, other, now) < mine
        for other in Use
        if other is not use
    )


def _rank(bucket: Bucket, quota: Quota, use: Use, now: float) -> tuple[bool, int]:
    """Those that are owed their floor first, and in either group in the order of `Use`, or the last submits first."""
    owed = quota.floors.get(use, 0.0) > 0 and bucket.owed_at.get(use, NEVER) <= now
    submits_first = use is Use.SUBMIT and bucket.submits_first_until >= now
    return (not owed, -1 if submits_first else use.value)


@dataclass(frozen=True, slots=True)
class Said:
    """What a provider has said of its quota. None: nothing."""

    limit_share: float | None = None
    """Its stated limit as a share of the configured one."""
    remaining: int | None = None
    reset_seconds: float | None = None
    wait_seconds: float | None = None
    refused: bool = False
    """It refused a request for coming too early."""


def hear(bucket: Bucket, quota: Quota, said: Said, now: float) -> Bucket:
    """Corrects the bucket by the provider's word. Only ever tightens, until the time that it states."""
    share, held = share_now(bucket, quota, now), bucket.held_until
    heard = share
    if said.limit_share is not None:
        heard = min(heard, said.limit_share)
    if said.refused:
        heard = min(heard, share * SLOWED_BY)
    if said.remaining == 0 and said.reset_seconds is not None:
        held = max(held, now + said.reset_seconds)
    if said.wait_seconds is not None:
        held = max(held, now + said.wait_seconds)
    if heard < share:
        heard = max(SMALLEST_RATE_SHARE, heard)
        return replace(bucket, held_until=held, rate_share=heard, rate_share_at=now)
    return bucket if held == bucket.held_until else replace(bucket, held_until=held)
